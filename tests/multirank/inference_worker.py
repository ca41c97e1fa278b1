"""What the ranks of an inference test do: answer and score through dc_megatron.inference alone."""

from __future__ import annotations

from dc_megatron.data.image_header import read_header
from dc_megatron.data.image_store import FolderStore
from dc_megatron.data.picture import make_picture
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.inference.generate import Question, answer
from dc_megatron.inference.score import score_file
from dc_megatron.inference.session import Session
from dc_megatron.inference.source import Source, resolve


def answers(source: Source, questions: list[tuple[str, tuple[str, ...]]], new_tokens: int) -> list[str]:
    session = Session(resolve(source))
    tokenizer = load_tokenizer(source.model_name_or_path, source.version)
    store, tiling = FolderStore(""), session.resolved.tiling
    asked = []
    for text, images in questions:
        sizes = [read_header(store, image) for image in images]
        pictures = [make_picture(tiling, i, size.width, size.height) for i, size in zip(images, sizes, strict=True)]
        asked.append(Question(text, tuple(pictures)))
    return answer(session, tokenizer, asked, [store], new_tokens, "pil").texts


def scores(source: Source, data_path: str, image_folder: str) -> tuple[list[dict], dict]:
    return score_file(
        source, data_path, image_folder, model_max_length=128, max_bad_sample_rate=0.5, image_backend="pil", rows=3
    )


def answers_by_whole_passes(source: Source, questions: list[tuple[str, tuple[str, ...]]], new_tokens: int) -> list[str]:
    """As ``answers``, with no keys and values kept."""
    kept, Session.keeps_keys = Session.keeps_keys, False
    try:
        return answers(source, questions, new_tokens)
    finally:
        Session.keeps_keys = kept
