"""The stream of rows: every sample as often as it counts, any position at once, and plans in files that are checked."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dc_megatron.config import DataSource
from dc_megatron.data import row_plan
from dc_megatron.data.epoch_order import epoch_samples, grouped_by_modality_length
from dc_megatron.data.plan_file import plan_path, read_plan
from dc_megatron.data.row_plan import RowPlan
from dc_megatron.errors import UserError
from tests.helpers.data_files import data_config

SAMPLES = 300
STATE = np.random.RandomState(11)
LENGTHS = STATE.randint(20, 180, SAMPLES).astype(np.int32)
TILES = STATE.randint(0, 3, SAMPLES).astype(np.int32)
SOURCES = (np.arange(SAMPLES) >= 200).astype(np.int16)
STEP = 8


def config(weights=(1.0, 1.0), **values):
    made = data_config("images", "data.json", "tokenizer", **{"packing": "best-fit", "seq_length": 400, **values})
    return replace(made, sources=tuple(DataSource(f"{weight}.json", "images", weight) for weight in weights))


def plan(folder=None, *, rows_per_step=STEP, lengths=LENGTHS, tiles=TILES, sources=SOURCES, **values):
    return RowPlan(lengths, tiles, sources, config(**values), rows_per_step=rows_per_step, folder=folder)


def rows(of, first, last):
    return [of[position].tolist() for position in range(first, last)]


@pytest.mark.parametrize("packing", ["best-fit", "none"])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_epoch_has_every_sample_as_often_as_its_source_counts(packing, order):
    of = plan(rows_per_step=1, weights=(2.0, 0.25), order=order, packing=packing)
    position, parts = 0, []
    for epoch in range(3):
        count = of.rows_of_epoch(epoch)
        seen = np.concatenate([of[place] for place in range(position, position + count)])
        position += count
        times = np.bincount(seen, minlength=SAMPLES)
        assert (times[SOURCES == 0] == 2).all()
        assert times[SOURCES == 1].max() == 1
        assert times[SOURCES == 1].sum() == 25
        parts.append(np.flatnonzero(times[SOURCES == 1]).tolist())
    assert parts[0] != parts[1] != parts[2]


def test_no_row_is_too_long_and_steps_are_sorted_across_the_end_of_an_epoch():
    of = plan()
    end = of.rows_of_epoch(0)
    assert end % STEP, "the step at the end of the first epoch should straddle it"
    for step in range(2 * end // STEP):
        own = [of[position] for position in range(step * STEP, (step + 1) * STEP)]
        tiles = [TILES[row].sum() for row in own]
        assert tiles == sorted(tiles)
        assert max(LENGTHS[row].sum() for row in own) <= 400
    planned = plan(rows_per_step=1)
    first = end // STEP * STEP
    assert sorted(rows(of, first, first + STEP)) == sorted(rows(planned, first, first + STEP))


@pytest.mark.parametrize(
    "values",
    [{}, {"weights": (1.0, 0.5)}, {"packing": "none"}, {"packing": "none", "group_by_modality_length": True}],
    ids=["packed", "weighted", "none", "grouped"],
)
def test_any_position_gives_what_the_whole_run_gives_there(values, tmp_path):
    last = 3 * plan(**values).rows_of_epoch(0)
    whole = rows(plan(**values), 0, last)
    for position in (0, last // 3 - 1, last // 3, last // 2, last - 1):
        assert plan(**values)[position].tolist() == whole[position]
    resumed = plan(str(tmp_path), **values)
    assert rows(resumed, last // 2, last) == whole[last // 2 :]
    backwards = plan(str(tmp_path), **values)
    assert [backwards[position].tolist() for position in reversed(range(last))] == whole[::-1]


def test_a_step_may_be_longer_than_an_epoch():
    of = plan(rows_per_step=500)
    seen = np.bincount(np.concatenate([of[position] for position in range(500)]), minlength=SAMPLES)
    assert seen.max() - seen.min() <= 1
    assert rows(of, 480, 520) == rows(plan(rows_per_step=500), 480, 520)


def test_epochs_differ_and_so_do_seeds():
    of = plan()
    count = of.rows_of_epoch(0)
    assert sorted(rows(of, 0, count)) != sorted(rows(of, count, 2 * count))
    assert rows(of, 0, 20) != rows(plan(seed=2), 0, 20)


def test_without_packing_the_order_is_the_permutation_of_seed_and_epoch():
    of = plan(packing="none", seed=5)
    for epoch in (0, 1):
        words = np.random.SeedSequence([5, epoch]).generate_state(4)
        expected = np.random.RandomState(words).permutation(SAMPLES).tolist()
        assert rows(of, epoch * SAMPLES, (epoch + 1) * SAMPLES) == [[sample] for sample in expected]
    in_files = rows(plan(packing="none", order="sequential"), 0, 2 * SAMPLES)
    assert in_files == [[sample] for sample in [*range(SAMPLES)] * 2]


def test_rows_of_epochs_rounds_a_fraction_up():
    of = plan()
    first, second = of.rows_of_epoch(0), of.rows_of_epoch(1)
    assert of.rows_of_epochs(2) == first + second
    assert of.rows_of_epochs(1.5) == first + -(-second // 2)
    assert of.rows_of_epochs(0.001) == 1
    assert plan(packing="none").rows_of_epochs(2.5) == 750


def test_an_epoch_without_samples_is_refused():
    with pytest.raises(UserError, match=r"--data_path 1\.0\.json"):
        plan(lengths=LENGTHS[:0], tiles=TILES[:0], sources=SOURCES[:0])


def test_statistics_are_those_of_the_rows_that_the_loader_takes():
    of = plan()
    figures = of.statistics(data_parallel_sizes=(2, 4, 3))
    count = of.rows_of_epoch(0)
    assert (figures.rows, figures.samples, figures.tokens) == (count, SAMPLES, LENGTHS.sum())
    whole = np.array([TILES[of[position]].sum() for position in range(count // STEP * STEP)]).reshape(-1, 4)
    assert figures.imbalance[4] == pytest.approx(whole.max(axis=1).sum() / whole.mean(axis=1).sum())
    assert set(figures.imbalance) == {2, 4}
    assert plan(packing="none").statistics().samples_per_row == 1


def test_the_identity_names_all_that_the_stream_depends_on():
    longer, more = LENGTHS.copy(), TILES.copy()
    longer[3] += 1
    more[3] += 1
    others = [
        {"seed": 2},
        {"order": "sequential"},
        {"seq_length": 500},
        {"weights": (1.0, 0.5)},
        {"packing": "none"},
        {"packing": "none", "group_by_modality_length": True},
        {"rows_per_step": 4},
        {"lengths": longer},
        {"tiles": more},
        {"sources": 1 - SOURCES},
    ]
    identities = [plan(**values).identity for values in ({}, *others)]
    assert len(set(identities)) == len(identities)
    # Neither the kind of integers nor what only concerns pixels counts.
    same = plan(image_backend="dali", lengths=LENGTHS.astype(np.int64), tiles=TILES.astype(np.int16))
    assert same.identity == identities[0]
    assert plan(packing="none", rows_per_step=4).identity == plan(packing="none").identity


def test_plans_lie_in_one_file_an_epoch_and_are_not_made_again(tmp_path, monkeypatch):
    first = plan(str(tmp_path))
    first.rows_of_epochs(2)
    names = sorted(name for name in os.listdir(tmp_path) if name.endswith(".npy"))
    assert [name.rsplit("-", 1)[1] for name in names] == ["0.npy", "1.npy"]
    whole = rows(first, 0, 60)
    monkeypatch.setattr(row_plan, "pack", lambda *_, **__: pytest.fail("planned again"))
    assert rows(plan(str(tmp_path)), 0, 60) == whole
    # The order within a step is no part of the file.
    assert plan(str(tmp_path), rows_per_step=4).rows_of_epoch(0) == first.rows_of_epoch(0)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_plans_of_other_settings_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "samples.arrow").write_text("index")
    old = plan(str(tmp_path))
    whole = rows(old, 0, 40)
    new = plan(str(tmp_path), seed=2)
    names = sorted(os.listdir(tmp_path))
    assert len(names) == 3
    assert {"samples.arrow", "rows.lock"} < set(names)
    assert rows(new, 0, 40) != whole
    # Who has the removed file open goes on with it.
    assert rows(old, 0, 40) == whole


def _truncated(content):
    return content[:-100]


def _without_content(content):
    return b""


def _flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def _another_number_of_rows(content):
    words = np.frombuffer(content[128:], dtype="<i8").copy()
    words[2] -= 1
    words[3] += 1
    return content[:128] + words.tobytes()


def _noise(content):
    return np.random.RandomState(0).bytes(len(content))


def _other_numbers(content):
    return content.replace(b"<i8", b"<f8")


@pytest.mark.parametrize(
    "damage", [_truncated, _without_content, _flipped, _another_number_of_rows, _noise, _other_numbers]
)
def test_a_damaged_plan_is_made_again_and_said(tmp_path, caplog, damage):
    whole = rows(plan(), 0, 60)
    plan(str(tmp_path))
    (path,) = tmp_path.glob("*.npy")
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        assert rows(plan(str(tmp_path)), 0, 60) == whole
    assert f"{path}: cannot be used" in caplog.text
    assert path.read_bytes() == content


def test_a_plan_with_objects_in_it_is_not_unpickled(tmp_path, caplog):
    plan(str(tmp_path))
    (path,) = tmp_path.glob("*.npy")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert read_plan(str(path)) is None
    assert "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, caplog):
    missing = tmp_path / "missing"
    assert rows(plan(str(missing)), 0, 60) == rows(plan(), 0, 60)
    assert "stays in memory" in caplog.text
    assert not missing.exists()


WORKER = """
import sys
import numpy as np
from dc_megatron.config import DataConfig, DataSource, ImageTiling
from dc_megatron.data.row_plan import RowPlan
lengths = np.random.RandomState(1).randint(20, 180, 3000)
config = DataConfig(
    (DataSource("data.json", "images"),), "", "v1", "pad", 192, 192, ImageTiling(28, 4, 2), packing="best-fit"
)
of = RowPlan(lengths, lengths % 3, np.zeros(3000), config, rows_per_step=8, folder=sys.argv[1])
print([of[position].tolist() for position in range(200)])
"""


def test_processes_that_start_together_get_the_same_rows(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(set(printed)) == 1
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_plan_path_names_key_and_epoch():
    assert plan_path("folder", "abc", 3) == os.path.join("folder", "rows-abc-3.npy")


class TestEpochSamples:
    def test_a_fraction_takes_at_least_one_sample_and_whole_copies_come_first(self):
        sources = np.array([0, 1, 1, 0, 1])
        seen = epoch_samples(sources, [1.0, 0.01], 1, 0, "sequential").tolist()
        assert sorted(set(seen) & {1, 2, 4}) == [seen[sources[seen].tolist().index(1)]]
        assert len(seen) == 3
        assert epoch_samples(sources, [2.0, 1.0], 1, 0, "sequential").tolist() == [0, 1, 2, 3, 4, 0, 3]

    def test_the_part_is_drawn_anew_every_epoch_and_evenly(self):
        sources = np.zeros(100, dtype=np.int16)
        times = np.zeros(100, dtype=int)
        for epoch in range(200):
            times += np.bincount(epoch_samples(sources, [0.3], 9, epoch, "shuffled"), minlength=100)
        # 200 draws of 0.3: 60, with a deviation of 6.5.
        assert times.sum() == 200 * 30
        assert 30 < times.min() < times.max() < 90

    def test_a_source_does_not_move_the_draws_of_another(self):
        one, two = np.zeros(50, dtype=int), np.repeat([0, 1], 50)
        alone = np.sort(epoch_samples(one, [0.5], 3, 0, "shuffled"))
        beside = np.sort(epoch_samples(two, [0.5, 0.5], 3, 0, "shuffled"))
        assert beside[beside < 50].tolist() == alone.tolist()
        assert (beside[beside >= 50] - 50).tolist() != alone.tolist()

    def test_no_samples(self):
        assert len(epoch_samples(np.zeros(0, dtype=int), [1.0], 1, 0, "shuffled")) == 0


class TestGroupedByModalityLength:
    def grouped(self, order, batch=4, epoch=0, tiles=TILES):
        return grouped_by_modality_length(np.asarray(order), LENGTHS, tiles, batch, 1, epoch)

    def test_batches_have_one_modality_and_the_longest_first(self):
        order = np.random.RandomState(0).permutation(SAMPLES)
        grouped = self.grouped(order)
        assert sorted(grouped) == sorted(order)
        kinds = [(TILES > 0).sum() % 4 or 4, (TILES == 0).sum() % 4 or 4]
        whole = grouped[: -sum(kinds)].reshape(-1, 4)
        assert all(len(set((TILES[batch] > 0).tolist())) == 1 for batch in whole)
        assert all((np.diff(LENGTHS[batch]) <= 0).all() for batch in whole)
        modalities = [bool(TILES[batch[0]] > 0) for batch in whole]
        assert modalities != sorted(modalities)
        assert modalities != sorted(modalities, reverse=True)

    def test_the_last_batches_of_both_kinds_come_at_the_end_in_the_order_of_the_files(self):
        tiles = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1])
        order = np.array([9, 2, 8, 0, 5, 7, 6, 4, 3, 1])
        # With pictures: 9 0 7 6 | 3 1; without: 2 8 5 4, its last batch although it is whole.
        grouped = self.grouped(order, tiles=tiles)
        assert sorted(grouped[:4]) == [0, 6, 7, 9]
        assert grouped[4:].tolist() == [1, 2, 3, 4, 5, 8]

    def test_one_kind_of_samples_is_only_sorted_within_batches(self):
        order = np.random.RandomState(0).permutation(SAMPLES)
        grouped = self.grouped(order, tiles=np.ones(SAMPLES, dtype=int), batch=7)
        for first in range(0, SAMPLES, 7):
            assert sorted(grouped[first : first + 7]) == sorted(order[first : first + 7])
            assert (np.diff(LENGTHS[grouped[first : first + 7]]) <= 0).all()

    def test_every_epoch_has_another_order_of_batches(self):
        order = np.arange(SAMPLES)
        assert self.grouped(order, epoch=0).tolist() != self.grouped(order, epoch=1).tolist()
        assert self.grouped(order, epoch=1).tolist() == self.grouped(order, epoch=1).tolist()
        assert len(self.grouped(order[:0])) == 0
