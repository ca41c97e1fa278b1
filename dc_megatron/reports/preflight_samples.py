"""A few samples as the model gets them: text decoded from the ids of the index, targets apart, pictures in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dc_megatron.config import DataConfig, VisionConfig
from dc_megatron.data.image_store import ImageStore
from dc_megatron.data.index import SampleIndex
from dc_megatron.data.picture import Picture
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TextTokenizer, TokenisedSample
from dc_megatron.reports.preflight_columns import Columns
from dc_megatron.reports.preflight_images import as_the_tower_sees

MOST_SAMPLES = 8
_MOST_PICTURES = 4


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample: text that is a target or is none, or a picture."""

    text: str = ""
    target: bool = False
    picture: Picture | None = None


@dataclass(frozen=True)
class ShownSample:
    """``pictures``: (picture, data URI or "") of the first few."""

    sample: TokenisedSample
    pieces: tuple[Piece, ...]
    pictures: tuple[tuple[Picture, str], ...]


def shown_samples(
    index: SampleIndex,
    columns: Columns,
    config: DataConfig,
    vision: VisionConfig,
    tokenizer: TextTokenizer,
    stores: Sequence[ImageStore],
) -> list[ShownSample]:
    """MOST_SAMPLES random samples, of each source and with each number of pictures (none, one, several) one first."""
    shown = []
    for number in chosen_samples(columns, config.seed):
        sample = index[number]
        pictures = tuple(
            (picture, as_the_tower_sees(picture, stores, vision, config.image_aspect_ratio))
            for picture in sample.images[:_MOST_PICTURES]
        )
        shown.append(ShownSample(sample, tuple(pieces(sample, tokenizer)), pictures))
    return shown


def chosen_samples(columns: Columns, seed: int) -> list[int]:
    """Numbers of samples, in the order of the index."""
    order = np.random.RandomState(seed).permutation(len(columns.source))
    kinds = columns.source[order].astype(np.int64) * 3 + np.minimum(columns.pictures[order], 2)
    _, firsts = np.unique(kinds, return_index=True)
    ranks = np.full(len(order), len(order))
    ranks[firsts] = firsts
    return sorted(order[np.argsort(ranks, kind="stable")[:MOST_SAMPLES]].tolist())


def pieces(sample: TokenisedSample, tokenizer: TextTokenizer) -> list[Piece]:
    """The sample from its first position to its last."""
    found, images, start = [], iter(sample.images), 0
    for end in [*np.flatnonzero(sample.input_ids == IMAGE_ID).tolist(), len(sample.input_ids)]:
        found += _text(sample.input_ids[start:end], sample.labels[start:end] != IGNORE, tokenizer)
        if end < len(sample.input_ids):
            found.append(Piece(picture=next(images)))
        start = end + 1
    return found


def _text(ids: np.ndarray, target: np.ndarray, tokenizer: TextTokenizer) -> list[Piece]:
    """Runs of targets and of other tokens as text.

    Decoded from the stretch's beginning each time: a tokenizer may write the same ids differently at the beginning of a
    text, and a character may need several tokens.
    """
    ends = [*(np.flatnonzero(target[1:] != target[:-1]) + 1).tolist(), len(ids)] if len(ids) else []
    found, before = [], ""
    for end in ends:
        text = tokenizer.hugging_face.decode(
            ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        common = len(before) if text.startswith(before) else _common(before, text)
        found.append(Piece(text[common:], bool(target[end - 1])))
        before = text
    return found


def _common(one: str, other: str) -> int:
    """Characters that both begin with: where half of a character stood at the end, the two differ."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
