"""SIGKILL in the middle of saves: nothing half-made is taken for a checkpoint, and the run goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dc_megatron.reports.checkpoint_report import examine
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.manifest import MANIFEST
from dc_megatron.weights.staged_iteration import STAGING
from tests.end_to_end.launch import TRAIN, Finished, Launch, metrics, run, torchrun
from tests.helpers.workspace import training_flags

# Every step saves, so that a kill is never far from a save.
FLAGS = {"save_steps": 1, "lr_scheduler_type": "constant", "log-images": 0}


def command(workspace, output: Path, ranks: int, **more) -> list[str]:
    launcher = torchrun(ranks) if ranks > 1 else [sys.executable]
    parallel = {"tensor-model-parallel-size": ranks} if ranks > 1 else {}
    return [*launcher, *TRAIN, *training_flags(workspace, output, **{**FLAGS, **parallel, **more})]


def inspect(folder: Path) -> Finished:
    return run([sys.executable, "tools/inspect_checkpoint.py", str(folder), "--check"], folder.parent / "inspect")


def kill_in_a_save(launch: Launch, output: Path, saves: int, moment: str) -> None:
    """Kill all ranks in a save behind the first ``saves``: when it begins, a little later, or at its manifest."""
    first = checkpoint_folder.newest_complete(output)[0] or 0

    def begun() -> bool:
        complete, _ = checkpoint_folder.newest_complete(output)
        if (complete or 0) < first + saves:
            return False
        pattern = f"{STAGING}*/iter_*/{MANIFEST}*" if moment == "manifest" else f"{STAGING}*"
        return any(output.glob(pattern))

    launch.wait_until(begun, "a save")
    time.sleep(0.03 if moment == "later" else 0)
    launch.kill()


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "saves"),
    [(1, {}), (2, {}), pytest.param(2, {"async-save": True}, id="2-async")],
)
def test_kills_during_saves_leave_whole_checkpoints_and_the_run_goes_on(workspace, tmp_path, ranks, saves):
    output = tmp_path / "run"
    reached = 0
    for number, moment in enumerate(("begin", "later", "manifest")):
        with Launch(command(workspace, output, ranks, max_steps=5000, **saves), tmp_path / f"logs{number}") as launch:
            kill_in_a_save(launch, output, saves=2, moment=moment)
            if number:
                assert f"resuming from iteration {reached}" in launch.text[0]
        newest, incomplete = checkpoint_folder.newest_complete(output)
        assert incomplete == [], "half of an iteration has an iteration's name"
        assert newest >= reached + 2
        report = examine(str(output), check=True)
        assert (report["verified"], report["problems"]) == (True, [])
        assert [entry["iteration"] for entry in report["checkpoints"]] == list(range(1, newest + 1))
        reached = newest
    whole = run(
        command(workspace, output, ranks, max_steps=reached + 2, **saves, **{"verify-checkpoint": True}),
        tmp_path / "logs",
    )
    whole.assert_succeeded()
    assert f"resuming from iteration {reached} of {output}" in whole.output
    assert checkpoint_folder.newest_complete(output) == (reached + 2, [])
    assert not list(output.glob(f"{STAGING}*"))
    assert inspect(output).status == 0
    assert [line["iteration"] for line in metrics(output)] == list(range(1, reached + 3))

    # A flipped bit is found before loading, and the next older iteration is offered.
    payload = next((output / f"iter_{reached + 2:07d}").glob("__0_*.distcp"))
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 4
    payload.write_bytes(data)
    more = {"max_steps": reached + 3, "verify-checkpoint": True}
    refused = run(command(workspace, output, ranks, **more), tmp_path / "refused")
    refused.assert_refused("--verify-checkpoint", f"{payload.name} is damaged", f"--ckpt-step {reached + 1}")
    if ranks == 1:
        assert refused.status == 2
    assert inspect(output).status == 1
