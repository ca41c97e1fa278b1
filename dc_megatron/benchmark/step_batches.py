"""The same samples as packed rows and as padded micro-batches: what ours and the baselines train on.

Lengths are LLaVA's (llava_lengths), rows are the run's own plan, ids and pixels are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from dc_megatron.benchmark.llava_lengths import IMAGE_TOKENS, llava_lengths
from dc_megatron.benchmark.step_workload import Workload
from dc_megatron.config import DataConfig, DataSource, image_share, image_tiling
from dc_megatron.data.picture import make_picture
from dc_megatron.data.row_plan import RowPlan
from dc_megatron.data.rows import assemble, row_length
from dc_megatron.data.tokenization import IGNORE, IMAGE_ID, TokenisedSample
from dc_megatron.errors import UserError

_POOL = 8  # pictures, that the samples share


@dataclass(frozen=True)
class Counts:
    """Of one step: samples, positions with something in them, targets, pictures, and positions with padding."""

    samples: int
    tokens: int
    supervised_tokens: int
    images: int
    positions: int


class StepBatches:
    """The micro-batches of step 0, 1, ...: ``packed`` and ``padded`` ones of the same samples.

    text_only: every picture's positions hold words without a target instead.
    """

    def __init__(self, workload: Workload, text_only: bool = False):
        self._workload, self._text_only = workload, text_only
        vision, connector = workload.vision_config, workload.connector_config
        self._tiling = image_tiling(vision, connector)
        self._vocabulary = workload.language_config.vocab_size
        self._image_size = vision.image_size
        steps = workload.warmup + workload.steps * workload.rounds
        # Twenty rows at least: the plan fills rows from many samples.
        count = max(400, 20 * workload.rows * steps)
        self._lengths, self._tiles = llava_lengths(count, workload.stage, workload.seed)
        image = self._tiling.tile_tokens
        if image > IMAGE_TOKENS:
            raise UserError(f"workload {workload.name}: pictures of {image} positions; up to {IMAGE_TOKENS}")
        # The lengths are those of pictures of IMAGE_TOKENS positions.
        self._lengths -= self._tiles * (IMAGE_TOKENS - image)
        if workload.seq_length < int(self._lengths.max()):
            raise UserError(f"workload {workload.name}: seq_length {workload.seq_length} is shorter than a sample")

    @cached_property
    def _plan(self) -> RowPlan:
        config = DataConfig(
            sources=(DataSource("lengths", "pixels"),),
            tokenizer_path="",
            version="v1",
            image_aspect_ratio="pad",
            model_max_length=self._workload.seq_length,
            seq_length=self._workload.seq_length,
            tiling=self._tiling,
            packing="best-fit",
        )
        sources = np.zeros(len(self._lengths), dtype=np.int16)
        return RowPlan(self._lengths, self._tiles, sources, config, rows_per_step=self._workload.rows, folder=None)

    def packed(self, step: int, share: tuple[int, int] = (0, 1)) -> list[dict]:
        """Rows of the step, a micro-batch each. ``share``: (rank, size) of the group that shares the pixels."""
        first = step * self._workload.rows
        rows = [[self._sample(int(number)) for number in self._plan[first + row]] for row in range(self._workload.rows)]
        return [self._with_pixels(assemble([row], self._workload.seq_length, self._tiling), share) for row in rows]

    def padded(self, step: int, multiple: int = 1) -> list[dict]:
        """The same samples in an order of their own, ``padded_batch`` at a time, as long as the longest of them."""
        first, size = step * self._workload.rows, self._workload.padded_batch
        numbers = np.concatenate([self._plan[first + row] for row in range(self._workload.rows)])
        np.random.RandomState(self._workload.seed + step).shuffle(numbers)
        batches = []
        for start in range(0, len(numbers), size):
            rows = [[self._sample(int(number))] for number in numbers[start : start + size]]
            batches.append(self._with_pixels(assemble(rows, row_length(rows, multiple), self._tiling), (0, 1)))
        return batches

    def lengths(self, step: int) -> list[int]:
        """Positions of each sample of the step."""
        first = step * self._workload.rows
        return [int(self._lengths[n]) for row in range(self._workload.rows) for n in self._plan[first + row]]

    def _sample(self, number: int) -> TokenisedSample:
        """One conversation: a picture where it has one, a question, and an answer that has the targets."""
        length, pictured = int(self._lengths[number]), bool(self._tiles[number])
        image = self._tiling.tile_tokens
        state = np.random.RandomState(number)
        text = length - image if pictured else length
        words = state.randint(3, self._vocabulary, size=text).astype(np.int32)
        targets = max(1, round(text * self._workload.supervised_share))
        labels = np.where(np.arange(text) < text - targets, IGNORE, words).astype(np.int32)
        if not pictured:
            return TokenisedSample(words, labels, (), length)
        if self._text_only:
            extra = state.randint(3, self._vocabulary, size=image).astype(np.int32)
            ids = np.concatenate([words[:1], extra, words[1:]])
            labels = np.concatenate([labels[:1], np.full(image, IGNORE, np.int32), labels[1:]])
            return TokenisedSample(ids, labels, (), length)
        ids = np.concatenate([words[:1], np.array([IMAGE_ID], np.int32), words[1:]])
        labels = np.concatenate([labels[:1], np.array([IGNORE], np.int32), labels[1:]])
        picture = make_picture(self._tiling, f"{number % _POOL}", self._image_size, self._image_size)
        return TokenisedSample(ids, labels, (picture,), length)

    def _with_pixels(self, batch: dict, share: tuple[int, int]) -> dict:
        mine = [batch["pictures"][i] for i in image_share(batch["num_images"], *share)]
        pool = picture_pool(self._image_size)
        shape = (3, self._image_size, self._image_size)
        batch["pixel_values"] = torch.stack([pool[int(p.name)] for p in mine]) if mine else torch.zeros(0, *shape)
        return batch


@cache
def picture_pool(size: int) -> torch.Tensor:
    """float32 [pictures, 3, size, size], normal."""
    return torch.randn(_POOL, 3, size, size, generator=torch.Generator().manual_seed(5))


def counts_of(batches: list[dict]) -> Counts:
    """Sums over the micro-batches of a step."""
    names = ("samples", "tokens", "supervised_tokens", "images", "positions")
    return Counts(**{name: sum(batch["counts"][name] for batch in batches) for name in names})
