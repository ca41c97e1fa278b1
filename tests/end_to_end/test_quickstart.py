"""The README's first command: the whole script with few steps, and behind --all as a newcomer runs it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class FirstStep(threading.Thread):
    """Notes after how many seconds the first optimizer step of ``folder``'s first stage is on file; None if never."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.metrics = folder / "text" / "metrics.jsonl"
        self.seconds: float | None = None
        self._left = threading.Event()

    def __enter__(self) -> FirstStep:
        self._begin = time.monotonic()
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        self.join()

    def run(self) -> None:
        while self.seconds is None and not self._left.wait(0.2):
            if self.metrics.is_file() and self.metrics.stat().st_size:
                self.seconds = time.monotonic() - self._begin


def run_quickstart(folder: Path, **settings) -> tuple[dict, str]:
    """summary.json and what the script printed."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"QUICKSTART_RUN": str(folder), **{f"QUICKSTART_{k}": str(v) for k, v in settings.items()}}
    done = subprocess.run(
        ["bash", "examples/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return json.loads((folder / "summary.json").read_text()), done.stdout


def check_summary(summary: dict, printed: str, folder: Path) -> None:
    assert [stage["name"] for stage in summary["stages"]] == ["text", "stage1", "stage2"]
    assert summary["tensor_model_parallel_size"] == 2
    for stage in summary["stages"]:
        assert stage["first_loss"] > 0
        assert stage["last_loss"] > 0
        assert stage["seconds"] > 0
        assert (folder / stage["name"] / "latest_checkpointed_iteration.txt").is_file()
    assert (folder / "loss.png").stat().st_size > 1000
    assert "tools/generate.py" in printed
    assert summary["same_answers_from_the_export"] == summary["questions"] > 0
    assert (folder / "export" / "dc_manifest.json").is_file()


def test_quickstart_with_few_steps(tmp_path):
    folder = tmp_path / "run"
    summary, printed = run_quickstart(folder, STEPS=6, TEXTS=300, PICTURES=80, HELD_OUT=4)
    check_summary(summary, printed, folder)
    for name in ("stage1", "stage2"):
        assert 0 <= next(stage["accuracy"] for stage in summary["stages"] if stage["name"] == name) <= 1
    assert (folder / "stage1" / "mm_projector.safetensors").is_file()


@pytest.mark.long
def test_quickstart_learns(tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["bash", "tools/setup_env.sh"], cwd=ROOT, check=True)  # the install is not part of the launch
    with FirstStep(folder) as first_step:
        summary, printed = run_quickstart(folder)
    assert first_step.seconds is not None
    assert first_step.seconds <= 60, f"the first optimizer step came after {first_step.seconds:.0f} s"
    check_summary(summary, printed, folder)
    for stage in summary["stages"]:
        assert stage["last_loss"] < stage["first_loss"]
    assert summary["accuracy"] >= 0.85
    assert summary["accuracy_blank_image"] <= summary["accuracy"] / 2
