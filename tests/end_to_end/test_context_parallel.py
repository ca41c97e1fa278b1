"""Two processes that share every row train as one process does, and go on from what they saved."""

from __future__ import annotations

import sys

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
DIVIDED = {"context-parallel-size": 2}
# What a step has read; neither depends on who computes it.
COUNTS = ("samples", "tokens", "positions", "supervised_tokens", "images", "substituted_images")


def run(workspace, output, launcher: list[str], **more) -> list[dict]:
    words = training_flags(workspace, output, **RECIPE, **more)
    train_forked([*launcher, *TRAIN, *words], output / "logs")
    return metrics(output)


def test_rows_on_two_processes(workspace, tmp_path):
    """1e-5 of losses near 7: sums of fp32 in another order, and three Adam steps upon them."""
    expected = run(workspace, tmp_path / "one", [sys.executable], max_steps=3, save_strategy="no")
    run(workspace, tmp_path / "two", torchrun(2), max_steps=2, save_steps=2, **DIVIDED)
    divided = run(workspace, tmp_path / "two", torchrun(2), max_steps=3, save_steps=3, **DIVIDED)
    assert [line["loss"] for line in divided] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert [line["grad_norm"] for line in divided] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)
    for ours, theirs in zip(divided, expected, strict=True):
        assert [ours[name] for name in COUNTS] == [theirs[name] for name in COUNTS]
