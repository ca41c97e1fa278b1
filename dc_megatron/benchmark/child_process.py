"""A program run as a whole and measured from outside: time, processor time, memory of it and its children.

Linux only: what a process holds is read from /proc while it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dc_megatron.errors import UserError

SAMPLE_SECONDS = 0.05
_OUTPUT_TAIL = 4000


@dataclass(frozen=True)
class Measurement:
    """One run of a program.

    ``seconds``: from its start to its end. ``cpu_seconds``: user and system time of it and of the children it waited
    for. ``peak_anonymous``: bytes of RssAnon + RssShmem, the largest sum over all its processes of one sample.
    ``peak_resident``: the same of VmHWM, each process's own peak of resident memory, file pages included.
    ``disk_read``: bytes that came from the disk and not from the page cache, over all its processes.
    ``output``: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_anonymous: int
    peak_resident: int
    disk_read: int
    output: str


def measure(command: Sequence[str], env: Mapping[str, str] | None = None) -> Measurement:
    """Run ``command`` to its end; UserError with the end of its output where it fails."""
    with tempfile.TemporaryFile() as printed:
        start = time.perf_counter()
        # A session of its own: its processes are known by it even when their parents are gone.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            with MemorySampler(process.pid) as sampler:
                # wait4 and not getrusage: the latter adds up all children that ever were.
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if process.returncode:
        raise UserError(f"{' '.join(command)}: ended with {process.returncode}\n{output[-_OUTPUT_TAIL:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measurement(seconds, cpu, sampler.peak_anonymous, sampler.peak_resident, sampler.disk_read, output)


class MemorySampler:
    """Looks every ``SAMPLE_SECONDS``, as a context, at the memory of process ``leader`` and its descendants.

    /proc/PID/status is read, not smaps_rollup: that one walks the page tables under a lock that the program wants.
    """

    def __init__(self, leader: int):
        self.peak_anonymous = 0
        self.peak_resident = 0
        self.disk_read = 0
        self._leader = leader
        self._family = {leader}
        self._others: set[int] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.sample()
            self._stopped.wait(SAMPLE_SECONDS)

    def sample(self) -> None:
        """Take one look."""
        self._find_family()
        found = [fields for pid in self._family if (fields := status_fields(pid))]
        # What a child read is added to its parent's when it ends, so only the living are counted.
        self.disk_read = max(self.disk_read, sum(map(disk_read_of, self._family)))
        anonymous = sum(fields.get("RssAnon", 0) + fields.get("RssShmem", 0) for fields in found)
        self.peak_anonymous = max(self.peak_anonymous, anonymous)
        self.peak_resident = max(self.peak_resident, sum(fields.get("VmHWM", 0) for fields in found))

    def _find_family(self) -> None:
        """Only processes that appeared since the last look are examined."""
        living = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._family &= living
        self._others &= living
        for pid in sorted(living - self._family - self._others):
            parent, session = parent_and_session(pid)
            (self._family if parent in self._family or session == self._leader else self._others).add(pid)


def status_fields(pid: int) -> dict[str, int]:
    """The fields of /proc/PID/status that are in kB, in bytes; {} when the process is gone."""
    fields = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                fields[name] = int(value.split()[0]) * 1024
    return fields


def disk_read_of(pid: int) -> int:
    """Bytes that a process has had read from the disk; 0 when it is gone."""
    # A process that ends may refuse, too.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/io", encoding="utf-8") as file:
        for line in file:
            if line.startswith("read_bytes: "):
                return int(line.split()[1])
    return 0


def parent_and_session(pid: int) -> tuple[int, int]:
    """Ids of a process's parent and session; (0, 0) when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the program, in parentheses, may hold anything.
            fields = file.read().rpartition(")")[2].split()
        return int(fields[1]), int(fields[3])
    except (OSError, IndexError, ValueError):
        return 0, 0
