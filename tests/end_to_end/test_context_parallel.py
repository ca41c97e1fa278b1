"""Two processes that share every row train as one process does, and either goes on from what the other saved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.end_to_end.launch import TRAIN, metrics, torchrun, train_forked
from tests.helpers.workspace import training_flags

RECIPE = {
    "packing": "best-fit",
    "seq_length": 256,
    "micro_batch_size": None,
    "global_batch_size": 2,
    "log_images": 0,
    # Steps at one rate, however many of them a run is to make.
    "lr_scheduler_type": "constant",
}
# What a step has read, whoever computes it.
COUNTS = ("samples", "tokens", "positions", "supervised_tokens", "images", "substituted_images")
EVALUATION = ("eval_samples", "eval_supervised_tokens", "eval_images")
# Losses near 7: sums of fp32 in another order, and three Adam steps upon them.
TOLERANCE = 1e-5


def train(workspace, output: Path, processes: int, steps: int, **more) -> None:
    """To step ``steps``, from where ``output`` stands."""
    divided = {"context-parallel-size": processes} if processes > 1 else {}
    start = torchrun(processes) if processes > 1 else [sys.executable]
    words = training_flags(workspace, output, **RECIPE, **divided, max_steps=steps, save_steps=steps, **more)
    train_forked([*start, *TRAIN, *words], output / f"logs {steps}")


def assert_alike(folder: Path, expected: Path) -> None:
    for ours, theirs in zip(metrics(folder), metrics(expected), strict=True):
        assert ours["iteration"] == theirs["iteration"]
        loss, counts = ("loss", COUNTS) if "loss" in theirs else ("eval_loss", EVALUATION)
        assert ours[loss] == pytest.approx(theirs[loss], abs=TOLERANCE)
        assert [ours[name] for name in counts] == [theirs[name] for name in counts]
        if loss == "loss":
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_two_processes_and_then_one_train_as_one(workspace, tmp_path):
    evaluated = {"eval_data_path": workspace["data"], "eval_steps": 2}
    train(workspace, tmp_path / "one", 1, 3, **evaluated)
    train(workspace, tmp_path / "two", 2, 2, **evaluated)
    train(workspace, tmp_path / "two", 1, 3, **evaluated)
    assert len(metrics(tmp_path / "one")) == 5, "three steps and two evaluations"
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
def test_one_process_and_then_two(workspace, tmp_path):
    """The mean of each micro-batch, and an optimizer that is spread over the ranks of a row."""
    recipe = {"loss-reduction": "microbatch"}
    train(workspace, tmp_path / "one", 1, 4, **recipe)
    for processes, steps in ((1, 1), (2, 3), (2, 4)):
        train(workspace, tmp_path / "two", processes, steps, **recipe)
    assert_alike(tmp_path / "two", tmp_path / "one")
