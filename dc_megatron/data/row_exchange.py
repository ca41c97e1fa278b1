"""Even rows by exchange: two rows swap the two samples that bring their sums closest, half of all rows at a time.

A *table* of rows is int64 [rows, slots]; an entry is the place of a sample in its window, or n for an empty slot.
``lengths`` and ``tiles`` are int64 [n + 1], of every place, with 0 for the empty slot. Integers only, so that the same
rows come out on every machine.
"""

from __future__ import annotations

import numpy as np

# Slots of a row that are looked at in one round: their product with those of the partner is the work.
_SLOTS = 12
_NEVER = np.iinfo(np.int64).max


def deal(lengths: np.ndarray, rows: int) -> np.ndarray:
    """A table of ``rows`` rows: the longest samples one to each row, the next ones in reverse, and so on."""
    samples = len(lengths) - 1
    # Empty slots, because rows of the same sum may hold different numbers of samples.
    slots = -(-samples // rows) + 2
    table = np.full(rows * slots, samples, dtype=np.int64)
    table[:samples] = np.argsort(-lengths[:-1], kind="stable")
    table = table.reshape(slots, rows)
    table[1::2] = table[1::2, ::-1].copy()
    return np.ascontiguousarray(table.T)


def exchange(
    table: np.ndarray,
    lengths: np.ndarray,
    tiles: np.ndarray,
    state: np.random.RandomState,
    *,
    rounds: int,
    tile_worth: int,
    limit: int | None = None,
) -> None:
    """Make the rows of ``table`` alike, in place.

    A swap counts by how far the two rows' lengths are apart afterwards, and their tiles, one tile being worth
    ``tile_worth`` positions. ``limit``: no swap may bring a row above so many positions.
    """
    rows, slots = table.shape
    sums, of_tiles = lengths[table].sum(axis=1), tiles[table].sum(axis=1)
    first, second = np.arange(slots), np.arange(slots)
    for number in range(rounds if rows > 1 else 0):
        upper, lower = _pairs(sums if limit is None else of_tiles, number, state)
        if slots > _SLOTS:
            first, second = state.permutation(slots)[:_SLOTS], state.permutation(slots)[:_SLOTS]
        ours, theirs = table[upper[:, None], first], table[lower[:, None], second]
        # [pairs, swaps]: what the upper row loses and the lower row gains.
        length = (lengths[ours][:, :, None] - lengths[theirs][:, None, :]).reshape(len(upper), -1)
        tile = (tiles[ours][:, :, None] - tiles[theirs][:, None, :]).reshape(len(upper), -1)
        apart, tiles_apart = sums[upper] - sums[lower], of_tiles[upper] - of_tiles[lower]
        score = (apart[:, None] - 2 * length) ** 2 + (tile_worth * (tiles_apart[:, None] - 2 * tile)) ** 2
        if limit is not None:
            score[(sums[upper][:, None] - length > limit) | (sums[lower][:, None] + length > limit)] = _NEVER
        best = score.argmin(axis=1)
        now = apart**2 + (tile_worth * tiles_apart) ** 2
        better = np.flatnonzero(score[np.arange(len(upper)), best] < now)
        best, upper, lower = best[better], upper[better], lower[better]
        at, to = first[best // len(second)], second[best % len(second)]
        table[upper, at], table[lower, to] = table[lower, to], table[upper, at]
        length, tile = length[better, best], tile[better, best]
        sums[upper] -= length
        sums[lower] += length
        of_tiles[upper] -= tile
        of_tiles[lower] += tile


def _pairs(load: np.ndarray, number: int, state: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Two equally long lists of rows that meet in a round: at random, or the fullest with the emptiest."""
    half = len(load) // 2
    if number % 2 == 0:
        order = state.permutation(len(load))
        return order[:half], order[half : 2 * half]
    order = np.argsort(-load, kind="stable")
    upper, lower = order[:half], order[::-1][:half]
    # Every other time not the very fullest with the very emptiest, which have met before.
    return upper, lower if number % 4 == 1 else lower[state.permutation(half)]


def relieve(
    table: np.ndarray, lengths: np.ndarray, state: np.random.RandomState, *, limit: int, rounds: int, patience: int
) -> None:
    """Bring rows above ``limit`` positions down, in place, by swaps with rows below it; what cannot be done stays.

    Every round each of them meets another row; over after ``patience`` rounds without a swap.
    """
    slots = table.shape[1]
    first, second = np.arange(slots), np.arange(slots)
    sums, idle = lengths[table].sum(axis=1), 0
    for _ in range(rounds):
        above, below = np.flatnonzero(sums > limit), np.flatnonzero(sums < limit)
        pairs = min(len(above), len(below))
        if not pairs or idle == patience:
            return
        above, below = state.permutation(above)[:pairs], state.permutation(below)[:pairs]
        if slots > _SLOTS:
            first, second = state.permutation(slots)[:_SLOTS], state.permutation(slots)[:_SLOTS]
        ours, theirs = table[above[:, None], first], table[below[:, None], second]
        length = (lengths[ours][:, :, None] - lengths[theirs][:, None, :]).reshape(pairs, -1)
        excess = np.maximum(sums[above][:, None] - length, limit) + np.maximum(sums[below][:, None] + length, limit)
        best = excess.argmin(axis=1)
        gained = np.flatnonzero(excess[np.arange(pairs), best] < sums[above] + limit)
        idle = 0 if len(gained) else idle + 1
        best, above, below = best[gained], above[gained], below[gained]
        at, to = first[best // len(second)], second[best % len(second)]
        table[above, at], table[below, to] = table[below, to], table[above, at]
        sums[above] -= length[gained, best]
        sums[below] += length[gained, best]
