"""Real processes of three sides on a tiny workload: the same samples, weights and first loss."""

from __future__ import annotations

import math

import pytest

from dc_megatron.benchmark.step_processes import VariantProcesses
from dc_megatron.benchmark.step_variants import VARIANTS
from dc_megatron.benchmark.step_workload import read_workload
from dc_megatron.errors import UserError

# Captions with pictures of 16 positions: samples of some 40.
TINY = {
    "language.hidden_size": 32,
    "language.intermediate_size": 48,
    "language.num_hidden_layers": 2,
    "language.num_attention_heads": 4,
    "language.num_key_value_heads": 2,
    "language.vocab_size": 250,  # padded to 256 by ours
    "vision.hidden_size": 32,
    "vision.intermediate_size": 48,
    "vision.num_attention_heads": 2,
    "vision.num_hidden_layers": 4,
    "vision.image_size": 56,
    "stage": 1,
    "seq_length": 256,
    "rows": 2,
    "padded_batch": 4,
    "threads": 1,
    # Large, so that a step changes the loss by more than its rounding.
    "learning_rate": 1e-2,
}
SIDES = ("ours", "megatron-plain", "hf")
# fp32, sums in another order: measured at 5e-7, with two orders of room.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """By side: what it is and two steps on the same samples; of hf the profile of another, and an error."""
    workload = read_workload("cpu-small", TINY)
    # Beside each other: importing takes the longest.
    processes = {name: VariantProcesses(workload, VARIANTS[name], TINY) for name in SIDES}
    path = str(tmp_path_factory.mktemp("profile") / "of a step.txt")
    try:
        found = {}
        for name, side in processes.items():
            found[name] = {"built": side.ask("build"), "steps": [side.ask("step 0"), side.ask("step 0")]}
        found["hf"] |= {"profile": processes["hf"].ask(f"profile 2 {path}"), "path": path}
        with pytest.raises(UserError) as raised:
            processes["hf"].ask("profile 3 /no/such/folder/file.txt")
        found["hf"]["error"] = str(raised.value)
        return found
    finally:
        for side in processes.values():
            side.stop()


@pytest.mark.parametrize("other", SIDES[1:])
def test_first_losses_are_equal(answers, other):
    ours, theirs = (answers[name]["steps"][0] for name in ("ours", other))
    assert abs(ours["loss"] - theirs["loss"]) <= TOLERANCE
    # Weights of deviation 0.02 know nothing: every id is as likely.
    assert ours["loss"] == pytest.approx(math.log(250), abs=0.1)


@pytest.mark.parametrize("other", SIDES[1:])
def test_losses_after_a_step_are_equal(answers, other):
    """What has been learnt is the same as well: gradients over all micro-batches, their clipping, Adam."""
    ours, theirs = (answers[name]["steps"][1] for name in ("ours", other))
    assert abs(ours["loss"] - theirs["loss"]) <= TOLERANCE
    assert answers["ours"]["steps"][0]["loss"] - ours["loss"] > 0.1


@pytest.mark.parametrize("other", SIDES[1:])
def test_they_train_on_the_same_samples(answers, other):
    for ours, theirs in zip(*(answers[name]["steps"] for name in ("ours", other)), strict=True):
        same = ("samples", "tokens", "supervised_tokens", "images")
        assert {name: ours["counts"][name] for name in same} == {name: theirs["counts"][name] for name in same}
        assert ours["counts"]["images"] > 0
        assert sum(ours["lengths"]) == ours["counts"]["tokens"]
        assert ours["lengths"] == theirs["lengths"]
        assert ours["counts"]["positions"] == 2 * 256


@pytest.mark.parametrize("side", SIDES)
def test_what_a_side_tells_of_itself(answers, side):
    built, (first, second) = answers[side]["built"], answers[side]["steps"]
    assert built["trainable"] == ["connector", "llm"]
    assert built["transformer_engine"] is False
    assert built["threads"] == 1
    for step in (first, second):
        assert 0 <= step["data_wait_seconds"] < step["seconds"]
        parts = {"tower"} if side == "hf" else {"tower", "connector", "head", "optimizer"}
        assert set(step["sections"]) == parts
        assert 0 < sum(step["sections"].values()) < step["seconds"]
        assert step["peak_memory"] > 10**8, "bytes: Python and torch alone take more"


def test_a_profile_lies_where_it_was_asked_for(answers):
    profile = answers["hf"]["profile"]
    assert profile["kernels"][0]["share"] == max(row["share"] for row in profile["kernels"])
    assert sum(row["share"] for row in profile["kernels"]) <= 1.0 + 1e-9
    with open(answers["hf"]["path"], encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) == 1 + len(profile["kernels"])
    assert lines[1].endswith(profile["kernels"][0]["name"][:150])


def test_an_error_in_a_side_is_told_with_its_traceback(answers):
    said = answers["hf"]["error"]
    assert said.startswith("hf, profile 3 /no/such/folder/file.txt: FileNotFoundError: ")
    assert "Traceback" in said
