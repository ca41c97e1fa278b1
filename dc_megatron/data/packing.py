"""Samples to rows of a fixed length: which samples stand together in a row, and how rows are laid out within a step.

Pure integer work on lengths and tiles; the same rows come out on every machine.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dc_megatron.data.epoch_order import random_state

# Changes with every change of the rows that come out for the same input.
PACKER_VERSION = 1
WINDOW = 20_000


@dataclass(frozen=True)
class Rows:
    """Row r holds ``samples[starts[r]:starts[r + 1]]``; samples int64 [m], starts int64 [rows + 1]."""

    samples: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.starts[row] : self.starts[row + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """int64 [rows]: the sum of ``values[sample]`` over each row's samples."""
        running = np.concatenate([[0], np.cumsum(np.asarray(values)[self.samples], dtype=np.int64)])
        return running[self.starts[1:]] - running[self.starts[:-1]]

    def taken(self, numbers: np.ndarray) -> Rows:
        """The rows of these numbers, in this order."""
        counts = np.diff(self.starts)[numbers]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.repeat(self.starts[numbers] - starts[:-1], counts) + np.arange(starts[-1])
        return Rows(self.samples[places], starts)


def one_a_row(order: np.ndarray) -> Rows:
    """Every sample a row of its own, in ``order``."""
    return Rows(np.asarray(order, dtype=np.int64), np.arange(len(order) + 1, dtype=np.int64))


def pack(
    order: np.ndarray,
    lengths: np.ndarray,
    tiles: np.ndarray,
    seq_length: int,
    *,
    window: int = WINDOW,
    seed: Sequence[int] | None = None,
) -> Rows:
    """Rows of at most ``seq_length`` positions that hold every entry of ``order`` (sample numbers) once.

    lengths, tiles: int [n] of all samples. ``seed``: words that the order of rows within a window is drawn from; None
    sorts them by their first sample.
    """
    order = np.asarray(order, dtype=np.int64)
    lengths = np.asarray(lengths)
    longest = int(lengths[order].max(initial=0))
    assert longest <= seq_length, f"a sample of {longest} positions cannot stand in a row of {seq_length}"
    rows: list[list[int]] = []
    for number, first in enumerate(range(0, len(order), window)):
        own = _pack_window(lengths[order[first : first + window]], seq_length)
        own = sorted(sorted(row) for row in own)
        if seed is not None:
            own = [own[place] for place in random_state(*seed, number).permutation(len(own))]
        rows += [[first + place for place in row] for row in own]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Rows(order[np.array([place for row in rows for place in row], dtype=np.int64)], starts)


def _pack_window(lengths: np.ndarray, seq_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for place in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[place])
        found = bisect_left(free, (length, -1))
        if found == len(free):
            rows.append([place])
            insort(free, (seq_length - length, len(rows) - 1))
        else:
            space, row = free.pop(found)
            rows[row].append(place)
            insort(free, (space - length, row))
    return rows


def step_order(tiles: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Order of the rows of one step: alike rows side by side, so that ranks that run at the same time cost alike.

    tiles, attention: int [rows], of each row the tiles and the sum of the squared lengths.
    """
    return np.lexsort((attention, tiles))


def balanced(rows: Rows, lengths: np.ndarray, tiles: np.ndarray, rows_per_step: int) -> Rows:
    """``rows`` with every run of ``rows_per_step`` in its ``step_order``."""
    of_tiles, attention = rows.sums(tiles), rows.sums(np.asarray(lengths).astype(np.int64) ** 2)
    parts = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(rows), rows_per_step):
        step = slice(first, first + rows_per_step)
        parts.append(first + step_order(of_tiles[step], attention[step]))
    return rows.taken(np.concatenate(parts))


@dataclass(frozen=True)
class PackingStatistics:
    """Of the rows of an epoch. ``fill``: part of the positions that samples take, 0 to 1.

    ``imbalance``: for each data-parallel size D that divides a step, the sum over micro-steps of the largest number of
    tiles among the D rows that run at the same time, over the sum of their means; 1.0 is perfect.
    """

    rows: int
    samples: int
    tokens: int
    seq_length: int
    fill: float
    samples_per_row: float
    tiles_min: int
    tiles_mean: float
    tiles_max: int
    tiles_std: float
    imbalance: dict[int, float]


def statistics(
    rows: Rows,
    lengths: np.ndarray,
    tiles: np.ndarray,
    seq_length: int,
    rows_per_step: int = 1,
    data_parallel_sizes: Sequence[int] = (2, 8, 64),
) -> PackingStatistics:
    """Figures of ``rows`` in the order in which the loader takes them (see ``balanced``)."""
    tokens = int(rows.sums(lengths).sum())
    of_tiles = rows.sums(tiles)
    sizes = [size for size in data_parallel_sizes if rows_per_step % size == 0 and len(rows) >= rows_per_step]
    return PackingStatistics(
        rows=len(rows),
        samples=len(rows.samples),
        tokens=tokens,
        seq_length=seq_length,
        fill=tokens / (len(rows) * seq_length),
        samples_per_row=len(rows.samples) / len(rows),
        tiles_min=int(of_tiles.min()),
        tiles_mean=float(of_tiles.mean()),
        tiles_max=int(of_tiles.max()),
        tiles_std=float(of_tiles.std()),
        imbalance={size: _imbalance(of_tiles, rows_per_step, size) for size in sizes},
    )


def _imbalance(of_tiles: np.ndarray, rows_per_step: int, size: int) -> float:
    whole = of_tiles[: len(of_tiles) // rows_per_step * rows_per_step].reshape(-1, size)
    return float(whole.max(axis=1).sum() / max(whole.mean(axis=1).sum(), 1e-9))
