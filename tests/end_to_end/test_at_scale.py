"""What a long run on many machines needs, on two processes: stacks of a stall, restarts by torchrun."""

from __future__ import annotations

import os
import signal

import pytest

from dc_megatron.weights import checkpoint_folder
from tests.end_to_end.launch import TRAIN, Launch, last_iteration, metrics, torchrun
from tests.end_to_end.test_recipes import launch_recipe
from tests.helpers.workspace import training_flags

pytestmark = pytest.mark.long


def test_every_rank_says_where_it_stands_when_one_does_not_move(workspace, tmp_path):
    output = tmp_path / "run"
    words = training_flags(workspace, output, max_steps=40, **{"distributed-timeout-minutes": 1, "log_images": 0})
    stacks = [output / "stacks" / f"rank_{rank:05d}.txt" for rank in range(2)]
    with Launch([*torchrun(2), *TRAIN, *words, "--tensor-model-parallel-size", "2"], tmp_path / "logs") as launch:
        launch.wait_until(lambda: last_iteration(output) >= 3, "step 3")
        stopped = launch.ranks()[1]
        os.kill(stopped, signal.SIGSTOP)
        launch.wait_until(lambda: stacks[0].stat().st_size > 0, "the stacks of the rank that waits")
        os.kill(stopped, signal.SIGCONT)
        launch.finish().assert_succeeded()
    assert "in train_step" in stacks[0].read_text()
    assert "most recent call first" in stacks[1].read_text(), "its time was over too"
    assert last_iteration(output) == 40


def test_torchrun_starts_again_after_a_process_died_and_the_run_goes_on(workspace, tmp_path):
    output = tmp_path / "run"
    more = {"MAX_RESTARTS": "1", "SAVE_STEPS": "3", "BF16": "False"}
    with launch_recipe("pretrain_dc.sh", "bash", workspace, output, steps=12, **more) as launch:
        launch.wait_until(lambda: last_iteration(output) >= 4, "a step after the first checkpoint")
        os.kill(launch.ranks()[1], signal.SIGKILL)
        finished = launch.finish().assert_succeeded()
    assert "resuming from iteration" in finished.output
    assert [line["iteration"] for line in metrics(output)] == list(range(1, 13))
    assert checkpoint_folder.newest_complete(output) == (12, [])
