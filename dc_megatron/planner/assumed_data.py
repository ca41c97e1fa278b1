"""What a micro-batch holds where the data was not looked at: LLaVA-1.5's two data sets, as far as they are published.

The numbers of samples are the published ones. Lengths are means near which ``benchmark/llava_lengths.py`` draws; they
were not measured on the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one rank. length: positions of a sample as attention sees them (mean of squares over mean)."""

    positions: float
    most_positions: int
    images: float
    most_images: float
    supervised: float
    length: float


@dataclass(frozen=True)
class Mix:
    """A data set. text: positions of a sample without its picture. pictures: of a sample. supervised: share of text."""

    name: str
    samples: int
    text: float
    pictures: float
    supervised: float

    def sample_positions(self, picture_tokens: int) -> float:
        return self.text + self.pictures * picture_tokens


CAPTIONS = Mix("LLaVA-1.5's 558k captions", 558_128, text=24, pictures=1.0, supervised=0.9)
INSTRUCTIONS = Mix("LLaVA-1.5's 665k mix", 665_298, text=239, pictures=0.94, supervised=0.5)
# Of a packed row: benchmarks/results/packing.json.
FILL = 0.997


def assumed_mix(trainable: Sequence[str]) -> Mix:
    """The data of the stage that trains these parts."""
    return INSTRUCTIONS if {"llm", "lora"} & set(trainable) else CAPTIONS


def assumed_micro_batch(
    mix: Mix, picture_tokens: int, picture_tiles: int, rows: int, row_length: int, packed: bool
) -> MicroBatch:
    """``rows`` rows of ``row_length`` positions. picture_tokens, picture_tiles: of one picture, at most."""
    mean = min(mix.sample_positions(picture_tokens), row_length)
    samples = FILL * rows * row_length / mean if packed else rows
    images = samples * mix.pictures * picture_tiles
    return MicroBatch(
        positions=samples * mean,
        most_positions=rows * row_length,
        images=images,
        # A row has a picture or so more than the mean (packing evens them out).
        most_images=math.ceil(images) + picture_tiles if packed else rows * picture_tiles,
        supervised=samples * mix.text * mix.supervised,
        length=mean,
    )
