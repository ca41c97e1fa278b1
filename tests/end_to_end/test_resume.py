"""A run that was killed, or asked to stop, goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.manifest import MANIFEST
from tests.end_to_end.launch import TRAIN, Launch, last_iteration, metrics, run, torchrun, train_forked
from tests.helpers.workspace import training_flags

STEPS, SAVE_STEPS, KILLED_AFTER = 16, 4, 5
# What a step computed; the seconds it took are no part of that.
TIMES = ("step_seconds", "data_wait_seconds")
# Two packed rows a step, so that an epoch ends every few steps.
PACKED = {"packing": "best-fit", "seq_length": 256, "global_batch_size": 2, "micro_batch_size": None}
STAGE_2_TP2 = {**PACKED, "tensor-model-parallel-size": 2, "use-distributed-optimizer": True}
STAGE_2_DP2 = {"micro_batch_size": 1, "use-distributed-optimizer": True, "overlap-grad-reduce": True}
# The second stage has nothing that learns.
STAGE_1_PP2 = {"trainable": "connector", "pipeline-model-parallel-size": 2, "lr_scheduler_type": "constant"}


def command(workspace, output: Path, **more) -> list[str]:
    recipe = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    return [*torchrun(2), *TRAIN, *training_flags(workspace, output, **{**recipe, **more})]


def computed(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]


def assert_same_steps(found: Path, expected: Path, first: int, last: int) -> None:
    """Every number of the steps after ``first`` up to ``last`` is equal to the last bit."""
    assert last - first >= 10, "the comparison should cover at least ten steps after the resume"
    assert [line["iteration"] for line in metrics(found)] == list(range(1, last + 1)), "a step twice, or none"
    assert computed(found)[first:last] == computed(expected)[first:last]


def kill_after_a_save(workspace, output: Path, **more) -> None:
    """A run that dies a step or more after its first checkpoint and before its second."""
    with Launch(command(workspace, output, **more), output / "logs") as launch:
        launch.wait_until(lambda: last_iteration(output) >= KILLED_AFTER, f"step {KILLED_AFTER}")
        launch.kill()
    assert checkpoint_folder.newest_complete(output) == (SAVE_STEPS, []), "the kill came too late for this test"


def leave_half_written(output: Path) -> None:
    """Later iterations as a crash may leave them: one without manifest, one whose manifest misses a file."""
    complete = Path(checkpoint_folder.iteration_folder(output, SAVE_STEPS))
    without_manifest = Path(shutil.copytree(complete, checkpoint_folder.iteration_folder(output, 2 * SAVE_STEPS)))
    (without_manifest / MANIFEST).unlink()
    file_lost = Path(shutil.copytree(complete, checkpoint_folder.iteration_folder(output, 3 * SAVE_STEPS)))
    next(file_lost.glob("*.distcp")).unlink()
    # The engine would end here with status 0 if it were asked.
    (output / checkpoint_folder.TRACKER).write_text("")
    (output / f".saving-iter_{5 * SAVE_STEPS:07d}" / f"iter_{5 * SAVE_STEPS:07d}").mkdir(parents=True)


@pytest.fixture(scope="module")
def stage_2(workspace, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    train_forked(command(workspace, output, **STAGE_2_TP2), output / "logs")
    assert len(metrics(output)) == STEPS
    return output


def test_after_kill_9_the_same_flags_go_on_bit_for_bit_from_the_newest_complete_checkpoint(
    workspace, stage_2, tmp_path
):
    output = tmp_path / "run"
    kill_after_a_save(workspace, output, **STAGE_2_TP2)
    leave_half_written(output)
    resumed = train_forked(command(workspace, output, **STAGE_2_TP2), output / "logs")
    assert "iteration 12, 8 was not written to its end; iteration 4 is taken" in resumed.output
    assert f"resuming from iteration {SAVE_STEPS} of {output}" in resumed.output
    assert_same_steps(output, stage_2, SAVE_STEPS, STEPS)
    assert checkpoint_folder.newest_complete(output) == (STEPS, [])
    # What was half written was written again, and counts now.
    assert all(checkpoint_folder.read_manifest(output, iteration) for iteration in range(4, STEPS + 1, SAVE_STEPS))
    assert not list(output.glob(".saving-*"))
    assert (output / checkpoint_folder.TRACKER).read_text() == str(STEPS)
    # Tokens are counted on over the resume.
    position = checkpoint_folder.read_manifest(output, STEPS).content
    assert position["consumed_tokens"] == {
        "processed": sum(line["tokens"] for line in metrics(output)),
        "supervised": sum(line["supervised_tokens"] for line in metrics(output)),
    }


@pytest.mark.long
def test_data_parallel_ranks_that_share_the_optimizer_go_on_bit_for_bit(workspace, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    train_forked(command(workspace, whole, **STAGE_2_DP2), whole / "logs")
    kill_after_a_save(workspace, output, **STAGE_2_DP2)
    train_forked(command(workspace, output, **STAGE_2_DP2), output / "logs")
    assert_same_steps(output, whole, SAVE_STEPS, STEPS)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="even"),
        pytest.param({"decoder-first-pipeline-num-layers": 1}, id="uneven", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_two_tensor_ranks_goes_on_at_two_pipeline_stages(more, workspace, stage_2, tmp_path):
    output = tmp_path / "run"
    for name in ("hf", checkpoint_folder.iteration_folder("", SAVE_STEPS)):
        shutil.copytree(stage_2 / name, output / name)
    more = {**PACKED, "pipeline-model-parallel-size": 2, "use-distributed-optimizer": True, **more}
    resumed = train_forked(command(workspace, output, **more), output / "logs")
    assert f"resuming from iteration {SAVE_STEPS}" in resumed.output
    found, expected = metrics(output), metrics(stage_2)[SAVE_STEPS:]
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["iteration"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), ours["iteration"]
        assert (ours["lr"], ours["tokens"], ours["images"]) == (theirs["lr"], theirs["tokens"], theirs["images"])


def test_a_run_does_not_go_on_in_another_order_of_the_data(workspace, stage_2, tmp_path):
    words = training_flags(workspace, stage_2, **PACKED, max_steps=STEPS, seed=7)
    refused = run([sys.executable, *TRAIN, *words], tmp_path / "logs").assert_refused(
        "--data_path", "seed", "--finetune"
    )
    assert refused.status == 2
    assert len(metrics(stage_2)) == STEPS, "the run that was refused left the folder alone"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.long),
        pytest.param(
            {"bf16": True, "use-distributed-optimizer": True}, id="bf16-distributed-optimizer", marks=pytest.mark.long
        ),
    ],
)
def test_sigusr1_saves_and_exits_and_a_stage_without_parameters_that_learn_resumes(more, workspace, tmp_path):
    stopped, output = tmp_path / "stopped", tmp_path / "run"
    flags = {**STAGE_1_PP2, **more}
    # The schedule is constant, so that steps do not depend on how many there will be.
    with Launch(command(workspace, stopped, **{**flags, "max_steps": 5000}), stopped / "logs") as launch:
        launch.wait_until(lambda: last_iteration(stopped) >= STEPS, f"step {STEPS}")
        # To one rank: the engine tells the others.
        ranks = launch.ranks()
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGUSR1)
        launch.finish().assert_succeeded()
    last = last_iteration(stopped)
    assert checkpoint_folder.newest_complete(stopped) == (last, [])
    assert last < 5000

    output.mkdir()
    for name in ("hf", checkpoint_folder.iteration_folder("", SAVE_STEPS)):
        shutil.copytree(stopped / name, output / name)
    shutil.copy(stopped / "metrics.jsonl", output)
    train_forked(command(workspace, output, **flags), output / "logs")
    assert_same_steps(output, stopped, SAVE_STEPS, STEPS)
