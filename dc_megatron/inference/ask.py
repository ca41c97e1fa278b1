"""Questions from a command line or a file to a model: what tools/generate.py does."""

from __future__ import annotations

import json
import os
from dataclasses import replace

from dc_megatron.config import DataConfig
from dc_megatron.data.conversation import IMAGE_MARK
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_store import FolderStore, open_store
from dc_megatron.data.llava_json import Record, parse_record, read_records
from dc_megatron.data.picture import Picture
from dc_megatron.data.record_pictures import PictureReader
from dc_megatron.errors import UserError
from dc_megatron.inference.source import Resolved, Source, resolve


def ask_once(source: Source, prompt: str, images: list[str], max_new_tokens: int, image_backend: str = "auto") -> dict:
    """{"question", "images", "answer"} of one question. UserError: bad source, missing picture, wrong image count."""
    resolved = resolve(source)
    store = FolderStore("")
    asked = _asked(PictureReader(store, resolved.tiling, 1), Record("", tuple(images), [{"value": prompt}]), "--image")
    session, tokenizer = start(resolved)
    from dc_megatron.inference.generate import Question, answer

    (text,) = answer(session, tokenizer, [Question(*asked)], [store], max_new_tokens, image_backend).texts
    return {"question": prompt, "images": images, "answer": text}


def ask_file(
    source: Source,
    data_path: str,
    image_folder: str,
    answers: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    image_backend: str = "auto",
) -> dict:
    """Ask the first message of every record of a LLaVA file; rank 0 writes ``answers``, one JSON object a line.

    ``expected`` is the record's first answer, or null. Returns {"questions", "exact", "answers"}.
    """
    resolved = resolve(source)
    store = open_store(image_folder or ".")
    reader = PictureReader(store, resolved.tiling, DataConfig.video_frames)
    questions = [_question(record, number, reader, data_path) for number, record in enumerate(read_records(data_path))]
    session, tokenizer = start(resolved)
    from dc_megatron.inference.generate import Question, answer

    given = []
    for first in range(0, len(questions), batch_size):
        part = [Question(q["asked"], q["pictures"]) for q in questions[first : first + batch_size]]
        given += answer(session, tokenizer, part, [store], max_new_tokens, image_backend).texts
    exact = sum(
        q["expected"] is not None and a.strip() == q["expected"].strip() for q, a in zip(questions, given, strict=True)
    )
    if int(os.environ.get("RANK", "0")) == 0:
        with open(answers, "w", encoding="utf-8") as file:
            for question, text in zip(questions, given, strict=True):
                line = {name: question[name] for name in ("id", "question", "expected")}
                file.write(json.dumps({**line, "answer": text}, ensure_ascii=False) + "\n")
    return {"questions": len(questions), "exact": exact, "answers": answers}


def start(resolved: Resolved):
    """(session, tokenizer) of a model; joins the process groups."""
    from dc_megatron.data.tokenization import load_tokenizer
    from dc_megatron.inference.session import Session

    source = resolved.source
    folder = os.path.join(source.load, "hf") if source.load else source.model_name_or_path
    tokenizer = load_tokenizer(folder, resolved.version)
    return Session(resolved), tokenizer


def _question(record: dict, number: int, reader: PictureReader, data_path: str) -> dict:
    where = f"--data_path {data_path}: record {number}"
    try:
        parsed = parse_record(record, number)
    except RecordFault as fault:
        raise UserError(f"{where}: {fault}") from None
    asked, pictures = _asked(reader, parsed, where)
    question, expected = [*map(_text, parsed.messages[:2]), None][:2]
    return {
        "id": parsed.identifier,
        "question": question,
        "expected": expected,
        "asked": asked,
        "pictures": pictures,
    }


def _text(message) -> str | None:
    text = message.get("value") if isinstance(message, dict) else None
    return text if isinstance(text, str) else None


def _asked(reader: PictureReader, record: Record, where: str) -> tuple[str, tuple[Picture, ...]]:
    """The first message, with an ``<image>`` for every frame of a video, and the pictures.

    UserError that begins with ``where``: no text, pictures that cannot be read, or are not as many as the marks.
    """
    if _text(record.messages[0]) is None:
        raise UserError(f"{where}: the first message has no text")
    try:
        # The other messages' marks are not asked about.
        messages, pictures = reader.read(replace(record, messages=record.messages[:1]))
    except RecordFault as fault:
        raise UserError(f"{where}: {fault}") from None
    text = messages[0]["value"]
    marks = text.count(IMAGE_MARK)
    if marks and marks != len(pictures):
        raise UserError(f"{where}: the question has {marks} {IMAGE_MARK} marks and {len(pictures)} pictures")
    return text, tuple(pictures)
