"""metrics.jsonl across restarts, the counts of a step, and the progress line."""

from __future__ import annotations

import json

import pytest

from dc_megatron.training.metrics import COUNTS, Clock, MetricsFile, StepCounts, progress_line


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def iterations(folder) -> list[int]:
    return [line["iteration"] for line in lines_of(folder)]


@pytest.fixture
def run(tmp_path):
    """A folder whose run wrote five iterations and was killed in the middle of the sixth."""
    metrics = MetricsFile(str(tmp_path / "run"), 0)
    for iteration in range(1, 6):
        metrics.write({"iteration": iteration, "loss": 1 / iteration})
    with open(metrics.path, "a", encoding="utf-8") as file:
        file.write('{"iteration": 6, "lo')
    return tmp_path / "run"


def test_every_line_is_on_disk_at_once(tmp_path):
    metrics = MetricsFile(str(tmp_path / "new" / "run"), 0)
    metrics.write({"iteration": 1, "loss": None})
    assert lines_of(tmp_path / "new" / "run") == [{"iteration": 1, "loss": None}]


def test_a_resumed_run_drops_what_it_will_write_again(run):
    metrics = MetricsFile(str(run), 3)
    assert iterations(run) == [1, 2, 3]
    metrics.write({"iteration": 4, "loss": 7.0})
    assert lines_of(run)[-1] == {"iteration": 4, "loss": 7.0}
    assert iterations(run) == [1, 2, 3, 4]


def test_half_a_line_is_dropped_and_nothing_else(run):
    MetricsFile(str(run), 5)
    assert iterations(run) == [1, 2, 3, 4, 5]
    assert (run / "metrics.jsonl").read_text().endswith("}\n")


def test_a_run_that_starts_anew_empties_the_file(run):
    MetricsFile(str(run), 0)
    assert iterations(run) == []


def test_counts_are_summed_and_taken_once():
    counts = StepCounts()
    zeros = dict.fromkeys(COUNTS, 0)
    counts.add({**zeros, "supervised_tokens": 3, "tokens": 10, "images": 1})
    counts.add({**zeros, "supervised_tokens": 4, "tokens": 20, "images": 2, "substituted_images": 1, "other": 9})
    assert counts.take() == {**zeros, "supervised_tokens": 7, "tokens": 30, "images": 3, "substituted_images": 1}
    assert counts.take() == dict.fromkeys(COUNTS, 0)


def test_the_clock_starts_again_with_every_lap(monkeypatch):
    times = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    assert (clock.lap(), clock.lap()) == (2.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 100, None, 1.0), "[........................] 0/100  1.00 s/step  1:40 left"),
        ((50, 100, 1.23456, 0.5), "[============............] 50/100  loss 1.2346  0.50 s/step  0:25 left"),
        ((100, 100, 0.1, 0.25), "[========================] 100/100  loss 0.1000  0.25 s/step  0:00 left"),
        ((10, 5210, 2.0, 10.0), "[........................] 10/5210  loss 2.0000  10.00 s/step  14:26:40 left"),
    ],
)
def test_the_progress_line(arguments, expected):
    assert progress_line(*arguments) == expected
