"""The engine's gradient buffers and what the optimizer keeps of them on a rank, number for number.

As megatron-core 0.19.2 lays them out (distributed/param_and_grad_buffer.py, optimizer/param_layout.py and
distrib_optimizer.py): parameters from the last to the first. Under the distributed optimizer each begins at a multiple
of 64, a bucket ends at a multiple of lcm(data-parallel size, 128), every rank owns an equal piece of every bucket and
keeps states for what of its piece belongs to a parameter. Without it there is no padding, and everybody keeps all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dc_megatron.planner.parameter_count import Model, Parameter, chunk_parameters

_PARAMETER_MULTIPLE, _BUCKET_MULTIPLE, _FAST_MULTIPLE = 64, 128, 2**16


@dataclass(frozen=True)
class Sharding:
    """data: data-parallel ranks. bucketed: --overlap-grad-reduce, which alone cuts the first chunk into buckets.

    bucket_size, buckets: --ddp-bucket-size, --ddp-num-buckets. fast_padding: --ddp-pad-buckets-for-high-nccl-busbw.
    """

    data: int = 1
    distributed: bool = False
    bucketed: bool = False
    bucket_size: int | None = None
    buckets: int | None = None
    fast_padding: bool = False

    def numbers_of_a_bucket(self, parameters: int) -> int | None:
        """At least; None: one bucket holds all. parameters: of all chunks of the rank."""
        if not self.bucketed:
            return None
        if self.buckets is not None:
            return parameters // self.buckets
        return self.bucket_size or max(40_000_000, 1_000_000 * self.data)


@dataclass
class Buffer:
    """numbers: of the buffer, padding included. owned: numbers of parameters that each data-parallel rank updates."""

    owned: list[int]
    numbers: int = 0
    learning: int = 0

    @property
    def padding(self) -> int:
        return self.numbers - self.learning


@lru_cache(maxsize=4096)
def rank_buffers(
    model: Model, tensor: int, stages: tuple[tuple[int, ...], ...], stage: int, sharding: Sharding
) -> tuple[Buffer, ...]:
    """One buffer for each chunk that has something to learn: all numbers are of one format."""
    chunks = [chunk_parameters(model, tensor, stages, stage, chunk) for chunk in range(len(stages[stage]))]
    size = sharding.numbers_of_a_bucket(sum(one.elements for chunk in chunks for one in chunk))
    buffers = []
    for number, chunk in enumerate(chunks):
        learning = [one for one in chunk if one.learns]
        if learning:
            # Later chunks and later stages are one bucket each.
            buffers.append(laid_out(learning, size if stage == 0 and number == 0 else None, sharding))
    return tuple(buffers)


def laid_out(learning: Sequence[Parameter], bucket_size: int | None, sharding: Sharding) -> Buffer:
    """The buffer of ``learning`` in buckets of at least ``bucket_size`` numbers."""
    total = sum(one.elements for one in learning)
    if not sharding.distributed:
        return Buffer([total] * sharding.data, total, total)
    divisor = math.lcm(sharding.data, _BUCKET_MULTIPLE, _FAST_MULTIPLE if sharding.fast_padding else 1)
    buffer = Buffer([0] * sharding.data, 0, total)
    bucket: list[tuple[int, int]] = []
    position = start = 0
    for one in reversed(learning):
        position = _up(position, _PARAMETER_MULTIPLE)
        if one.tied and bucket:
            position = start = _close(buffer, bucket, start, position, divisor)
        bucket.append((position, position + one.elements))
        position += one.elements
        if one.tied or (bucket_size is not None and position - start >= bucket_size):
            position = start = _close(buffer, bucket, start, position, divisor)
    if bucket:
        _close(buffer, bucket, start, position, divisor)
    return buffer


def _close(buffer: Buffer, bucket: list[tuple[int, int]], start: int, position: int, divisor: int) -> int:
    """End the bucket, hand its numbers to their owners, and return where the next one begins."""
    end = _up(position, divisor)
    piece = (end - start) // len(buffer.owned)
    for first, behind in bucket:
        for rank in range((first - start) // piece, (behind - 1 - start) // piece + 1):
            low, high = start + rank * piece, start + (rank + 1) * piece
            buffer.owned[rank] += min(behind, high) - max(first, low)
    bucket.clear()
    buffer.numbers = end
    return end


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
