"""Rows of packed samples: nothing lost, nothing too long, full, alike in tiles, and no order of lengths in time."""

import numpy as np
import pytest
import xxhash

from dc_megatron.benchmark.llava_lengths import llava_lengths
from dc_megatron.config import ImageTiling
from dc_megatron.data.packing import Rows, balanced, best_fit, one_a_row, pack, statistics, step_order
from dc_megatron.data.row_exchange import deal, exchange, relieve

SEED = (7, 0)


def some_lengths(kind):
    """(lengths, tiles, seq_length) of samples that pack well, badly, or in odd numbers."""
    state = np.random.RandomState(1)
    lengths, seq_length = {
        "like LLaVA": lambda: (llava_lengths(6000)[0], 4096),
        "like LLaVA, rows of a few": lambda: (llava_lengths(6000)[0], 2048),
        "captions": lambda: (llava_lengths(4000, stage=1)[0], 4096),
        "uniform": lambda: (state.randint(100, 2000, 5000), 4096),
        "exponential": lambda: (np.minimum(1 + state.exponential(500, 5000).astype(int), 4096), 4096),
        "a little over half a row": lambda: (np.full(500, 2049), 4096),
        "whole rows": lambda: (np.full(300, 4096), 4096),
        "three of five parts, two of five": lambda: (np.where(state.rand(2000) < 0.6, 2458, 1638), 4096),
        "long ones and crumbs": lambda: (np.concatenate([np.full(200, 4000), np.full(1800, 50)]), 4096),
        "whole rows and ones": lambda: (np.concatenate([np.full(2000, 512), np.ones(3000, dtype=int)]), 512),
        "very many a row": lambda: (state.randint(1, 50, 20000), 32768),
        "a few": lambda: (llava_lengths(7)[0], 4096),
        "one": lambda: (np.array([5]), 4096),
    }[kind]()
    return lengths, (lengths > 300).astype(np.int32), seq_length


KINDS = [
    "like LLaVA",
    "like LLaVA, rows of a few",
    "captions",
    "uniform",
    "exponential",
    "a little over half a row",
    "whole rows",
    "three of five parts, two of five",
    "long ones and crumbs",
    "whole rows and ones",
    "very many a row",
    "a few",
    "one",
]


def pictures_in_tiles(samples):
    """(lengths, tiles) of samples with one AnyRes picture of random size each; one in 16 is text only."""
    tiling = ImageTiling(
        tile_size=336,
        tile_tokens=576,
        side=24,
        pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        merge="spatial_unpad",
    )
    state = np.random.RandomState(0)
    sizes = state.randint(200, 1600, (500, 2))
    cut = [tiling.of(int(width), int(height)) for width, height in sizes]
    which = state.randint(0, len(cut), samples)
    text = np.exp(state.normal(5, 0.5, samples)).astype(int)
    lengths, tiles = np.array([one.tokens for one in cut])[which] + text, np.array([one.tiles for one in cut])[which]
    lengths[::16], tiles[::16] = state.randint(60, 4096, len(lengths[::16])), 0
    return lengths, tiles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [SEED, None], ids=["shuffled", "sequential"])
def test_every_entry_stands_in_one_row_and_no_row_is_too_long(kind, seed):
    lengths, tiles, seq_length = some_lengths(kind)
    order = np.random.RandomState(2).permutation(np.repeat(np.arange(len(lengths)), 1 + np.arange(len(lengths)) % 2))
    rows = pack(order, lengths, tiles, seq_length, seed=seed, window=3000)
    assert np.array_equal(np.sort(rows.samples), np.sort(order))
    assert rows.sums(lengths).max() <= seq_length
    assert np.diff(rows.starts).min() > 0
    assert rows.starts[[0, -1]].tolist() == [0, len(order)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_hardly_more_than_those_of_best_fit_decreasing(kind):
    lengths, tiles, seq_length = some_lengths(kind)
    rows = pack(np.arange(len(lengths)), lengths, tiles, seq_length, seed=SEED)
    plain = best_fit(range(len(lengths)), lengths.tolist(), seq_length, [])
    assert len(rows) <= 1.01 * len(plain) + 1


@pytest.mark.parametrize(("seq_length", "fill"), [(4096, 0.98), (8192, 0.98), (2048, 0.89)])
def test_fill_of_lengths_like_llava(seq_length, fill):
    lengths, tiles = llava_lengths(20_000)
    figures = statistics(pack(np.arange(20_000), lengths, tiles, seq_length, seed=SEED), lengths, tiles, seq_length)
    assert figures.fill >= fill
    assert figures.tokens == lengths.sum()


def test_fill_of_few_samples():
    lengths, tiles = llava_lengths(300)
    rows = pack(np.arange(300), lengths, tiles, 4096, seed=SEED)
    assert len(rows) <= -(-int(lengths.sum()) // 4096) + 1


def test_no_rows_of_no_samples():
    rows = pack(np.zeros(0, dtype=np.int64), np.array([5]), np.array([1]), 10, seed=SEED)
    assert len(rows) == 0


def test_the_mix_has_the_stated_means():
    for stage, mean, pictures in ((1, 600, 1.0), (2, 780, 0.94)):
        lengths, tiles = llava_lengths(100_000, stage)
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert tiles.mean() == pytest.approx(pictures, abs=0.005)
        assert lengths.max() <= 2048


def test_the_same_rows_come_out_on_every_machine():
    # Integers only: a machine's exp() may differ in the last digit.
    lengths = np.random.RandomState(1).randint(600, 1500, 2000)
    tiles = lengths % 4
    rows = pack(np.arange(2000), lengths, tiles, 4096, seed=SEED)
    content = np.concatenate([rows.starts, rows.samples]).astype("<i8")
    # Where this changes, PACKER_VERSION must: runs that were begun with other rows cannot be resumed.
    assert xxhash.xxh3_64_hexdigest(content.tobytes()) == "f63ca4a36b00d583"


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(AssertionError, match="a sample of 11 positions"):
        pack(np.arange(2), np.array([11, 3]), np.array([0, 0]), 10)


def test_lengths_have_no_trend_in_time():
    lengths, tiles = llava_lengths(40_000)
    order = np.random.RandomState(3).permutation(40_000)
    rows = pack(order, lengths, tiles, 4096, seed=SEED, window=4000)
    parts = np.array_split(lengths[rows.samples], 40)
    # 1,000 samples a part: their means scatter by the deviation of the lengths over sqrt(1,000).
    error = lengths.std() / np.sqrt(1000)
    means = np.array([part.mean() for part in parts])
    assert np.abs(means - lengths.mean()).max() < 4 * error
    slope = np.polyfit(np.linspace(-0.5, 0.5, 40), means, 1)[0]
    assert abs(slope) < 4 * error * np.sqrt(12 / 40)
    # Nor is there one inside a window: 20 windows of 4,000 laid over each other.
    within = np.array_split(lengths[rows.samples[:36_000]].reshape(9, 4000), 10, axis=1)
    assert max(abs(part.mean() - lengths.mean()) for part in within) < 4 * lengths.std() / np.sqrt(3600)


def test_who_shares_a_step_is_drawn_anew_for_every_seed():
    lengths, tiles = llava_lengths(10_000)
    order = np.arange(10_000)
    steps = []
    for seed in ((7, 0), (7, 1)):
        rows = pack(order, lengths, tiles, 4096, seed=seed)
        of_sample = np.empty(10_000, dtype=int)
        of_sample[rows.samples] = np.repeat(np.arange(len(rows)), np.diff(rows.starts)) // 16
        steps.append(of_sample)
    together = [step[:-1] == step[1:] for step in steps]
    # Of 120 steps, one in 120 neighbours would meet by chance.
    assert all(part.mean() < 0.02 for part in together)
    assert np.abs(np.corrcoef(*steps)[0, 1]) < 0.05


def test_sequential_rows_go_through_the_files_window_by_window():
    lengths, tiles = llava_lengths(9000)
    rows = pack(np.arange(9000), lengths, tiles, 4096, window=3000)
    windows = [set(rows[row] // 3000) for row in range(len(rows))]
    assert all(len(window) == 1 for window in windows)
    firsts = [rows[row][0] for row in range(len(rows))]
    assert firsts == sorted(firsts)
    assert all((np.diff(rows[row]) > 0).all() for row in range(len(rows)))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_a_step_costs_no_rank_more_than_the_spread_of_one_row(size):
    """The bound that sorting gives at any data-parallel size: what all waits of a step can add up to."""
    lengths, tiles = pictures_in_tiles(6000)
    rows = balanced(pack(np.arange(6000), lengths, tiles, 8192, seed=SEED), lengths, tiles, 32)
    of_tiles = rows.sums(tiles)
    for step in of_tiles[: len(rows) // 32 * 32].reshape(-1, 32 // size, size):
        spread = step.max() - step.min()
        assert (step.max(axis=1) - step.mean(axis=1)).sum() <= spread
        assert np.ptp(step.sum(axis=0)) <= spread


def test_tiles_of_lengths_like_llava_are_balanced():
    lengths, tiles = llava_lengths(20_000)
    rows = pack(np.random.RandomState(5).permutation(20_000), lengths, tiles, 4096, seed=SEED)
    unsorted = statistics(rows, lengths, tiles, 4096, 128)
    figures = statistics(balanced(rows, lengths, tiles, 128), lengths, tiles, 4096, 128)
    bounds = {2: 1.01, 8: 1.03, 64: 1.15}
    assert all(figures.imbalance[size] < bound for size, bound in bounds.items())
    assert all(figures.imbalance[size] < unsorted.imbalance[size] for size in (2, 8, 64))
    assert figures.tiles_std < 0.9
    assert figures.tiles_max <= 7


def test_tiles_of_pictures_cut_into_tiles_are_balanced():
    lengths, tiles = pictures_in_tiles(10_000)
    figures = statistics(pack(np.arange(10_000), lengths, tiles, 8192, seed=SEED), lengths, tiles, 8192)
    plain = best_fit(range(10_000), lengths.tolist(), 8192, [])
    of_plain = np.array([tiles[row].sum() for row in plain])
    assert figures.fill > 0.98
    assert figures.tiles_std < 0.16 * figures.tiles_mean
    assert figures.tiles_std < 0.8 * of_plain.std()


def test_balancing_moves_rows_within_their_step_only():
    rows = one_a_row(np.array([4, 2, 0, 3, 1]))
    lengths, tiles = np.array([10, 20, 30, 40, 50]), np.array([1, 0, 2, 2, 2])
    # Steps of three: samples 4, 2, 0 by tiles (2, 2, 1), equal ones by the square of their length; then 3, 1.
    assert balanced(rows, lengths, tiles, 3).samples.tolist() == [0, 2, 4, 1, 3]
    assert step_order(np.array([2, 1, 2]), np.array([9, 4, 1])).tolist() == [1, 2, 0]


def test_statistics_by_hand():
    rows = Rows(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 2, 3, 5, 6]))
    lengths, tiles = np.array([3, 4, 8, 5, 2, 10]), np.array([1, 1, 0, 4, 1, 3])
    figures = statistics(rows, lengths, tiles, 10, rows_per_step=4, data_parallel_sizes=(2, 3, 4))
    # Rows of 7, 8, 7 and 10 of 10 positions with 2, 0, 5 and 3 tiles.
    assert (figures.rows, figures.samples, figures.tokens, figures.fill) == (4, 6, 32, 0.8)
    assert (figures.tiles_min, figures.tiles_mean, figures.tiles_max) == (0, 2.5, 5)
    assert figures.samples_per_row == 1.5
    assert figures.imbalance == {2: (2 + 5) / (1 + 4), 4: 5 / 2.5}


def test_rows_taken_by_number():
    rows = Rows(np.array([9, 8, 7, 6]), np.array([0, 1, 3, 4])).taken(np.array([2, 1]))
    assert [rows[row].tolist() for row in range(len(rows))] == [[6], [8, 7]]


def test_exchange_keeps_every_sample_and_the_limit():
    state = np.random.RandomState(0)
    lengths = np.append(state.randint(100, 900, 500), 0)
    tiles = np.append(state.randint(0, 4, 500), 0)
    table = deal(lengths, 80)
    spread = np.ptp(lengths[table].sum(axis=1))
    exchange(table, lengths, tiles, state, rounds=30, tile_worth=10)
    sums = lengths[table].sum(axis=1)
    assert np.ptp(sums) < spread
    limit = int(sums.max()) - 2
    relieve(table, lengths, state, limit=limit, rounds=50, patience=10)
    assert lengths[table].sum(axis=1).max() <= limit
    tiles_before = tiles[table].sum(axis=1).std()
    exchange(table, lengths, tiles, state, rounds=30, tile_worth=300, limit=limit)
    assert lengths[table].sum(axis=1).max() <= limit
    assert tiles[table].sum(axis=1).std() < tiles_before
    assert np.array_equal(np.sort(table[table < 500]), np.arange(500))
