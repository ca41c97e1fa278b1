"""Stacks of a rank that does not move, in a process of its own: signals and timers belong to a process."""

from __future__ import annotations

import subprocess
import sys

WATCH = """
import os, signal, sys, time
from dc_megatron.training.stall_watch import StallWatch
watch = StallWatch(sys.argv[1], 3, float(sys.argv[2]))
def stands_still():
    time.sleep(1.5)
def asked():
    os.kill(os.getpid(), signal.SIGUSR2)
watch.alive()
{what}
watch.stop()
"""


def written(tmp_path, what: str, minutes: float) -> str | None:
    """What the rank wrote of itself; None: it left no file."""
    command = [sys.executable, "-c", WATCH.format(what=what), str(tmp_path), str(minutes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "stacks" / "rank_00003.txt"
    return path.read_text() if path.exists() else None


def test_stacks_are_written_when_no_step_ends(tmp_path):
    # 80 % of a sixtieth of a minute.
    assert "in stands_still" in written(tmp_path, "stands_still()", 1 / 60)


def test_stacks_are_written_when_asked_for(tmp_path):
    assert "in asked" in written(tmp_path, "asked()", 10)


def test_a_run_that_moves_leaves_no_file(tmp_path):
    assert written(tmp_path, "for _ in range(4):\n    time.sleep(0.4)\n    watch.alive()", 1 / 60) is None


def test_without_a_folder_stacks_go_to_standard_error():
    command = [sys.executable, "-c", WATCH.format(what="asked()"), "", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "in asked" in done.stderr
