"""Which positions of a packed row a context-parallel rank holds, and what they attend to. Host arithmetic only.

A row is cut into 2 * size pieces of equal length. Rank r holds the pieces r and 2 * size - 1 - r: one whose positions
look back on few others and one that looks back on many, so that where a row is one long sample all ranks attend to
equally many. A piece may begin or end in the middle of a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Kernels are told the longest stretch rounded up to this, so that those built for a length are built for few.
LENGTH_STEP = 512


@dataclass(frozen=True)
class Bounds:
    """Stretches that attend to themselves alone, each with as many keys as queries or with more in front.

    queries, keys: int32 [stretches + 1], where each begins, and the end. The last query of a stretch sees all its keys,
    the one before it one less, and so on. longest_query, longest_key: positions, at least those of every stretch.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of_samples(cls, bounds: Tensor, longest: int) -> Bounds:
        """Of whole samples: as many keys as queries."""
        return cls(bounds, bounds, longest, longest)


@dataclass(frozen=True)
class Piece:
    """Positions [start, end) of a row; their keys are the positions [first_key, end), divided by ``bounds``."""

    start: int
    end: int
    first_key: int
    bounds: Bounds


@dataclass(frozen=True)
class RowPieces:
    """Both pieces of a rank, and int64 [t] ``places``: of each of their positions the number in its own sample."""

    pieces: tuple[Piece, Piece]
    places: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> RowPieces:
        """The tensors on ``device``."""

        def moved(piece: Piece) -> Piece:
            bounds = piece.bounds
            queries, keys = (x.to(device, non_blocking=non_blocking) for x in (bounds.queries, bounds.keys))
            return replace(piece, bounds=replace(bounds, queries=queries, keys=keys))

        first, second = map(moved, self.pieces)
        return RowPieces((first, second), self.places.to(device, non_blocking=non_blocking))


def piece_ranges(length: int, rank: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """[start, end) of the two pieces of rank ``rank`` of a row of ``length`` positions, the earlier one first."""
    assert length % (2 * size) == 0, f"a row of {length} positions cannot be cut into {2 * size} pieces"
    each = length // (2 * size)
    late = 2 * size - 1 - rank
    return (rank * each, (rank + 1) * each), (late * each, (late + 1) * each)


def row_pieces(bounds: Sequence[int], rank: int, size: int) -> RowPieces:
    """The pieces of rank ``rank``. bounds: where the samples of the row begin, and its length; padding is a sample."""
    samples = [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
    first, second = (_piece(samples, *positions) for positions in piece_ranges(bounds[-1], rank, size))
    starts = torch.tensor([start for start, _ in samples]).repeat_interleave(
        torch.tensor([end - start for start, end in samples])
    )
    places = torch.arange(bounds[-1]) - starts
    return RowPieces((first, second), torch.cat([places[piece.start : piece.end] for piece in (first, second)]))


def _piece(samples: list[tuple[int, int]], start: int, end: int) -> Piece:
    met = [(first, min(last, end)) for first, last in samples if first < end and last > start]
    queries = [last - max(first, start) for first, last in met]
    keys = [last - first for first, last in met]
    return Piece(
        start,
        end,
        first_key=met[0][0],
        bounds=Bounds(_bounds(queries), _bounds(keys), rounded_up(max(queries)), rounded_up(max(keys))),
    )


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def rounded_up(length: int) -> int:
    """To a multiple of LENGTH_STEP."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def take_pieces(batch: dict, rank: int, size: int) -> dict:
    """What rank ``rank`` of ``size`` computes of a packed micro-batch of one row, of which every rank has the whole.

    input_ids, labels, position_ids, image_mask [1, t] with t = row / size, and image_feature_index, are those of its
    pieces; ``row_pieces`` is added. All else, the pixels and cu_seqlens among it, stays that of the row.
    """
    rows, length = batch["input_ids"].shape
    assert rows == 1, f"context parallelism divides one packed row, not {rows}"
    positions = torch.cat([torch.arange(*positions) for positions in piece_ranges(length, rank, size)])
    local = {name: batch[name][:, positions] for name in ("input_ids", "labels", "position_ids", "image_mask")}
    # Of a position of an image its number among those of the row, which is where its feature's number stands.
    number = batch["image_mask"].flatten().cumsum(0) - 1
    return {
        **batch,
        **local,
        "image_feature_index": batch["image_feature_index"][number[positions][local["image_mask"].flatten()]],
        "row_pieces": row_pieces(batch["cu_seqlens"].tolist(), rank, size),
    }
