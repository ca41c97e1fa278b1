"""A small model and samples of LLaVA's lengths to train it on: what the benchmark of packed training starts from.

A word is a token here, so that a text has exactly the length that was drawn for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence

import numpy as np

from dc_megatron.benchmark.llava_lengths import IMAGE_TOKENS, LONGEST, llava_lengths
from dc_megatron.data.conversation import template
from dc_megatron.errors import UserError

VERSION = "v1"
ANSWER_SHARE = 0.5  # of the words that the template leaves
VOCABULARY = 4096
PATCH = 14
LANGUAGE_MODEL, VISION_TOWER, IMAGES, DATA = "language_model", "vision_tower", "images", "data.json"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
# Small on purpose: packing changes nothing about it, and the real one takes a few percent of a step.
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
_PICTURES = 16  # files, that the samples share
_PICTURE_SIZE = (640, 480)  # as most of COCO's
_SPECIAL = ("<unk>", "<s>", "</s>")


def longest(scale: int) -> int:
    """Positions of the longest sample where all lengths are divided by ``scale``."""
    return LONGEST // scale


def lengths_of(samples: int, scale: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, tiles) of stage 2, int [samples]. A text keeps the words of the template, a question and an answer."""
    lengths, tiles = llava_lengths(samples, stage=2, seed=seed)
    image = tiles * (IMAGE_TOKENS // scale)
    shortest = image + _template_words() + 2
    return np.clip(lengths // scale, shortest, longest(scale)), tiles


def make_material(folder: str, samples: int, scale: int = 1, seed: int = 0) -> None:
    """Write the model, its tokenizer, the tower, pictures and a LLaVA JSON of ``samples`` records into ``folder``.

    scale: divides all lengths, those of pictures included; a square number that leaves a picture a whole grid.
    """
    side = math.isqrt(IMAGE_TOKENS // scale)
    if scale < 1 or side * side * scale != IMAGE_TOKENS:
        raise UserError(f"--scale {scale}: a picture's {IMAGE_TOKENS} positions cannot be divided so; use 1, 4 or 16")
    _write_language_model(os.path.join(folder, LANGUAGE_MODEL), seed)
    _write_tower(os.path.join(folder, VISION_TOWER), side * PATCH, seed)
    _write_pictures(os.path.join(folder, IMAGES), seed)
    lengths, tiles = lengths_of(samples, scale, seed)
    state = np.random.RandomState(seed)
    records = [
        _record(number, int(length) - int(tile) * (IMAGE_TOKENS // scale), bool(tile), state)
        for number, (length, tile) in enumerate(zip(lengths, tiles, strict=True))
    ]
    with open(os.path.join(folder, DATA), "w", encoding="utf-8") as file:
        json.dump(records, file)


def _template_words() -> int:
    form = template(VERSION)
    parts = (form.system, form.human, form.human_end, form.assistant, form.answer_lead, form.answer_end)
    return sum(len(part.split()) for part in parts)


def _record(number: int, text: int, has_picture: bool, state: np.random.RandomState) -> dict:
    """A question and an answer that come to ``text`` tokens with their template."""
    words = [f"w{word}" for word in state.randint(VOCABULARY - len(_SPECIAL), size=text - _template_words())]
    asked = len(words) - max(1, round(len(words) * ANSWER_SHARE))
    question, answer = " ".join(words[:asked]), " ".join(words[asked:])
    record: dict = {"id": str(number)}
    if has_picture:
        record["image"] = f"{number % _PICTURES}.jpg"
        question = f"<image>\n{question}"
    record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return record


def _write_language_model(folder: str, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LONGEST, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder, [*_SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(_SPECIAL)))])


def _write_tokenizer(folder: str, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _write_tower(folder: str, image_size: int, seed: int) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    CLIPVisionModel(CLIPVisionConfig(image_size=image_size, patch_size=PATCH, **_TOWER)).save_pretrained(folder)


def _write_pictures(folder: str, seed: int) -> None:
    """Smooth noise: a file is about as large as a photograph's of that size."""
    from PIL import Image

    os.makedirs(folder, exist_ok=True)
    state = np.random.RandomState(seed)
    for number in range(_PICTURES):
        noise = Image.fromarray(state.randint(256, size=(120, 160, 3), dtype=np.uint8))
        noise.resize(_PICTURE_SIZE, Image.Resampling.BICUBIC).save(os.path.join(folder, f"{number}.jpg"), quality=90)
