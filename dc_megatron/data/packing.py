"""Samples to rows of a fixed length: which samples stand together in a row, and how rows lie within a step.

Pure integer work on lengths and tiles; the same rows come out on every machine.

An epoch is cut into windows of its shuffled order. A window's samples are dealt to as few rows as its positions fill,
and rows exchange samples until they are equally long (and have alike numbers of tiles); see ``row_exchange``. What then
still does not fit is moved by best fit. Where lengths leave no such even rows, more rows are tried, and best-fit
decreasing of the whole window as well.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dc_megatron.data.epoch_order import random_state
from dc_megatron.data.row_exchange import deal, exchange, relieve

# Changes with every change of the rows that come out for the same input.
PACKER_VERSION = 1
WINDOW = 20_000
# A window has that many rows as well, because it leaves half a row empty on average.
_WINDOW_ROWS = 400
# Part of a row, in thousandths, that is tried to be filled at first.
_FILL = 999
# How often a window is tried, with 0.2 % more rows every time, before the number of rows is searched for.
_TRIES = 3
_EVEN_ROUNDS, _RELIEF_ROUNDS, _TILE_ROUNDS = 60, 100, 20


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

    lengths, tiles: int [n] of all samples. A row's samples come from one window of about ``window`` entries (more
    where rows hold very many), and stand in the row as they do in ``order``. ``seed``: words that the order of a
    window's rows is drawn from; None sorts them by their first sample.
    """
    order = np.asarray(order, dtype=np.int64)
    lengths, tiles = np.asarray(lengths), np.asarray(tiles)
    longest = int(lengths[order].max(initial=0))
    assert longest <= seq_length, f"a sample of {longest} positions cannot stand in a row of {seq_length}"
    windows = min(-(-len(order) // window), int(lengths[order].sum(dtype=np.int64)) // (_WINDOW_ROWS * seq_length))
    parts, counts, expected = [order[:0]], [order[:0]], None
    for number, own in enumerate(np.array_split(order, max(1, windows)) if len(order) else []):
        state = random_state(*((0,) if seed is None else seed), 1 + number)
        # Windows of a shuffled order are alike, so what one needs is a good guess for the next.
        rows, expected = _Window(lengths[own], tiles[own], seq_length, state).fill(expected if seed else None)
        rows = sorted(sorted(row) for row in rows)
        if seed is not None:
            rows = [rows[row] for row in state.permutation(len(rows))]
        parts.append(own[[place for row in rows for place in row]])
        counts.append(np.array([len(row) for row in rows]))
    return Rows(np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64))


class _Window:
    """The samples of a window; rows are lists of their places in it."""

    def __init__(self, lengths: np.ndarray, tiles: np.ndarray, seq_length: int, state: np.random.RandomState):
        self._lengths = np.append(lengths, 0).astype(np.int64)
        self._tiles = np.append(tiles, 0).astype(np.int64)
        self._count, self._seq_length, self._state = len(lengths), seq_length, state
        self._total = int(self._lengths.sum())
        self._tokens_per_tile = self._total // max(1, int(self._tiles.sum()))

    def fill(self, expected: tuple[int, int] | None) -> tuple[list[list[int]], tuple[int, int]]:
        """Few rows, none above ``seq_length``; and how many rows for how many positions to expect next time."""
        fewest = self._rows_for(1000, self._seq_length * _FILL)
        first = fewest if expected is None else max(fewest, self._rows_for(*expected))
        # Not remembered for the next window: a little more for every unlucky one would add up.
        for more in range(_TRIES):
            number = first + 2 * more * first // 1000
            rows = self._even_rows(number)
            if _suffices(number, rows):
                return rows, expected or (number, self._total)
        number, rows = self._search(fewest, rows)
        if expected is not None:
            # One unlucky window is not to make all later ones emptier.
            number = min(number, first + 2 * first // 1000)
        return rows, (number, self._total)

    def _rows_for(self, rows: int, positions: int) -> int:
        return max(1, min(self._count, -(-self._total * rows // positions)))

    def _search(self, low: int, best: list[list[int]]) -> tuple[int, list[list[int]]]:
        """Bisect the number of rows between ``low``, too few, and those of ``best`` or of best-fit decreasing."""
        plain = best_fit(range(self._count), self._lengths.tolist(), self._seq_length, [])
        # Its rows of many short samples have many tiles, which a few rows fewer are not worth.
        if 100 * len(plain) < 99 * len(best):
            best = self._alike_in_tiles(plain)
        high = len(best)
        while high - low > max(1, high // 500):
            middle = (low + high) // 2
            rows = self._even_rows(middle)
            if _suffices(middle, rows):
                best, high = rows, middle
            else:
                low = middle
        return high, best

    def _even_rows(self, number: int) -> list[list[int]]:
        """``number`` rows, and more where some could not be brought down to ``seq_length``."""
        table = deal(self._lengths, number)
        worth = self._tokens_per_tile // 12
        exchange(table, self._lengths, self._tiles, self._state, rounds=_EVEN_ROUNDS, tile_worth=worth)
        relieve(table, self._lengths, self._state, limit=self._seq_length, rounds=_RELIEF_ROUNDS, patience=20)
        kept, lengths = self._listed(table), self._lengths.tolist()
        moved = [place for row in kept for place in _overhang(row, lengths, self._seq_length)]
        return self._alike_in_tiles(best_fit(moved, lengths, self._seq_length, kept))

    def _alike_in_tiles(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows with their tiles evened out where that leaves each at ``seq_length`` or below."""
        # A few rows of very many samples would make the table large.
        usual = 8 + 4 * self._count // len(rows)
        others = [row for row in rows if len(row) >= usual]
        rows = [row for row in rows if len(row) < usual]
        if not rows:
            return others
        slots = 1 + max(map(len, rows))
        table = np.array([row + [self._count] * (slots - len(row)) for row in rows], dtype=np.int64)
        worth, limit = self._tokens_per_tile, self._seq_length
        exchange(table, self._lengths, self._tiles, self._state, rounds=_TILE_ROUNDS, tile_worth=worth, limit=limit)
        return self._listed(table) + others

    def _listed(self, table: np.ndarray) -> list[list[int]]:
        """The rows of a table of ``row_exchange``, without empty slots."""
        return [[place for place in row if place < self._count] for row in table.tolist()]


def _suffices(number: int, rows: list[list[int]]) -> bool:
    """Whether there are ``number`` rows or nearly so."""
    return len(rows) <= number + number // 500


def _overhang(row: list[int], lengths: list[int], limit: int) -> list[int]:
    """Take places out of ``row`` until ``limit`` positions are left: the shortest that is enough, or the longest."""
    out = []
    while (excess := sum(lengths[place] for place in row) - limit) > 0:
        place = min(row, key=lambda one: (lengths[one] < excess, abs(lengths[one] - excess), one))
        row.remove(place)
        out.append(place)
    return out


def best_fit(places: Iterable[int], lengths: list[int], limit: int, rows: list[list[int]]) -> list[list[int]]:
    """``rows`` and ``places``, the longest first, each in the row that it fills best, or in a new one."""
    rows = [list(row) for row in rows]
    free = sorted((limit - sum(lengths[place] for place in row), number) for number, row in enumerate(rows))
    for place in sorted(places, key=lambda one: (-lengths[one], one)):
        found = bisect_left(free, (lengths[place], -1))
        if found == len(free):
            rows.append([place])
            insort(free, (limit - lengths[place], len(rows) - 1))
        else:
            space, row = free.pop(found)
            rows[row].append(place)
            insort(free, (space - lengths[place], row))
    return [row for row in rows if row]


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
    """Figures of ``rows`` (at least one) in the order in which the loader takes them (see ``balanced``)."""
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
    mean = float(whole.mean(axis=1).sum())
    return float(whole.max(axis=1).sum()) / mean if mean else 1.0
