"""A command with what it used: processor time, and the largest resident size of it or of what it started.

The kernel hands a process the high-water mark of whoever started it, and a test process is large: a small process of
its own starts the command. ``python -m tests.helpers.measured FILE COMMAND...`` writes what was used into FILE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """``output``: standard output and error together. ``resident``: bytes. ``seconds``: of the processors."""

    status: int
    output: str
    resident: int
    seconds: float


def run_measured(command: list[str], folder: Path, cwd: Path, environment: dict[str, str]) -> Measured:
    """``command`` to its end; ``folder`` is for what was used."""
    used = folder / "used.json"
    wrapper = [sys.executable, str(Path(__file__).resolve()), str(used), *command]
    done = subprocess.run(
        wrapper, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Measured(done.returncode, done.stdout, *json.loads(used.read_text()))


def main(file: str, *command: str) -> int:
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    Path(file).write_text(json.dumps([used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]))
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
