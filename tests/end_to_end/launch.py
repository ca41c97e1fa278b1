"""Training runs started the way users start them: watched, interrupted, and read afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forked_runs import ForkedRuns

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("-m", "dc_megatron.pretrain")
# What the calling shell may have set for a launch of its own.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE")
_LAUNCH += ("NNODES", "NODE_RANK", "TENSOR_PARALLEL", "PIPELINE_PARALLEL", "DC_PRINT_ARGV", "DC_TORCHRUN_PYTHON")
# A start takes 15 to 20 s on two free cores; this is for machines that do other things too.
PATIENCE = 300


@dataclass(frozen=True)
class Finished:
    """A run that has ended; ``output`` and ``errors`` are its standard output and standard error."""

    status: int
    output: str
    errors: str
    seconds: float

    @property
    def everything(self) -> str:
        """As a terminal shows it; the engine sends log records to standard output."""
        return self.output + self.errors

    @property
    def messages(self) -> list[str]:
        """The lines with which the program told the user what to put right."""
        return [line for line in self.errors.splitlines() if line.startswith("error")]

    def assert_succeeded(self) -> Finished:
        assert self.status == 0, f"status {self.status}\n{self.output[-2000:]}\n{self.errors[-4000:]}"
        return self

    def assert_refused(self, *words: str) -> Finished:
        """Not status 0, exactly one message, no traceback of ours, and ``words`` in the message.

        torchrun always ends with a traceback of its own.
        """
        assert self.status != 0, f"was not refused\n{self.output[-2000:]}"
        assert len(self.messages) == 1, self.errors[-4000:]
        assert str(ROOT / "dc_megatron") not in self.errors, self.errors[-4000:]
        for word in words:
            assert word in self.messages[0], f"{word!r} is not in: {self.messages[0]}"
        return self


def environment(**more: str) -> dict[str, str]:
    """The test's environment without the traces of another launch; one thread a process, on the CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "DC_DEVICE": "cpu", "PYTHONPATH": path, **more}


def torchrun(processes: int = 2) -> list[str]:
    """The words of ``torchrun`` of this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


class Launch:
    """A command in the background; its output goes to files in ``folder``. Use it in a ``with`` block."""

    def __init__(self, command: list[str], folder: Path, cwd: Path = ROOT, **more: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = folder / "stdout", folder / "stderr"
        self._started = time.monotonic()
        with open(self._paths[0], "wb") as out, open(self._paths[1], "wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environment(**more)
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    @property
    def text(self) -> tuple[str, str]:
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._paths)
        return out, err

    def ranks(self) -> list[int]:
        """Process ids of the running ranks, lowest rank first."""
        ranks = {}
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
        return [ranks[rank] for rank in sorted(ranks)]

    def kill(self) -> None:
        """SIGKILL to every process of the launch at once: nothing gets a chance to tidy up."""
        self.signal_everyone(signal.SIGKILL)
        self.process.wait()

    def signal_everyone(self, number: signal.Signals) -> None:
        """A signal to the launcher and all processes below it."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *_descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return as soon as ``condition()``; fails where the run ends first or PATIENCE is over."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}\n{self.text[1][-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s\n{self.text[1][-4000:]}"
            time.sleep(0.005)

    def finish(self, patience: float = PATIENCE) -> Finished:
        """Wait for the end; a run that outlasts ``patience`` is killed and fails the test."""
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.text
            raise AssertionError(f"no end within {patience} s\n{out[-2000:]}\n{err[-4000:]}") from None
        return Finished(status, *self.text, time.monotonic() - self._started)


def run(command: list[str], folder: Path, patience: float = PATIENCE, cwd: Path = ROOT, **more: str) -> Finished:
    """``command`` to its end."""
    with Launch(command, folder, cwd, **more) as launch:
        return launch.finish(patience)


_forked = ForkedRuns()


def train_forked(command: list[str], folder: Path) -> Finished:
    """A training command that has to succeed, to its end, in ranks that are forked (see ``ForkedRuns``).

    For what is not about launching: ``run`` and ``Launch`` start processes as users do.
    """
    number = command.index("--nproc-per-node") + 1 if "--nproc-per-node" in command else None
    start = time.monotonic()
    argv = command[command.index(TRAIN[1]) + 1 :]
    done = _forked.run(argv, int(command[number]) if number else 1, folder).assert_succeeded()
    return Finished(0, done.output, done.errors, time.monotonic() - start)


def metrics(folder) -> list[dict]:
    """The complete lines of ``folder``/metrics.jsonl; a run may be writing the last one."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]


def last_iteration(folder) -> int:
    lines = metrics(folder)
    return lines[-1]["iteration"] if lines else 0


def _descendants(ancestor: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, queue = [], [ancestor]
    while queue:
        parent = queue.pop()
        children = [pid for pid, its_parent in parents.items() if its_parent == parent]
        found += children
        queue += children
    return found
