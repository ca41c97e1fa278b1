"""What a measurement was made on, and how its disk and page cache are brought to the same state before each step."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys

from dc_megatron.benchmark.work_folder import files_below
from dc_megatron.runtime.installed import version_of

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_DISTRIBUTIONS = ("torch", "megatron-core", "transformers", "transformer-engine", "safetensors", "xxhash", "numpy")


def describe(folder: str) -> dict:
    """Date, machine, the disk of ``folder``, versions and the commit, as plain values."""
    memory = _fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _fields("/proc/cpuinfo").get("model name", platform.machine()),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(memory) * 1024 / 1e9, 1),
            "filesystem": filesystem_of(folder),
            "kernel": platform.release(),
        },
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in _DISTRIBUTIONS}},
        "commit": _commit(),
    }


def _fields(path: str) -> dict[str, str]:
    """``name: value`` lines of a file of /proc."""
    with open(path, encoding="utf-8") as file:
        pairs = (line.partition(":") for line in file)
        return {name.strip(): value.strip() for name, _, value in pairs}


def filesystem_of(folder: str) -> str:
    """Type of the file system that ``folder`` (or the nearest parent that exists) lies on, such as ``ext4``."""
    folder = os.path.realpath(folder)
    best, kind = "", "unknown"
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            point = left.split()[4]
            inside = folder == point or folder.startswith(point.rstrip("/") + "/")
            # The last of equal points is the one that is seen.
            if inside and len(point) >= len(best):
                best, kind = point, right.split()[0]
    return kind


def _commit() -> str | None:
    """The commit of this program, with ``+changes`` where files of the program differ from it; None without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "dc_megatron", "tools")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def empty_page_cache(folders: list[str], whole: bool = True) -> str:
    """Have the next program read ``folders`` from the disk; returns how.

    All is written back first, so no step pays for what another left behind. ``whole``: drop all of the machine's cache,
    which only root may; else, and where that is refused, only these files are let go of. After a drop Python and
    PyTorch are read in again: they are the program, not the data, and `cp` has nothing like them.
    """
    os.sync()
    if not (whole and _drop_caches()):
        for path in files_below(folders):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        return "posix_fadvise(DONTNEED) of the checkpoint's files"
    subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True)
    return "drop_caches, then `import torch` once"


def _drop_caches() -> bool:
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="utf-8") as file:
            file.write("3\n")
    except OSError:
        return False
    return True


def gpu() -> dict | None:
    """Name, driver and memory of the first GPU as nvidia-smi tells, or None without one."""
    try:
        fields = "name,driver_version,memory.total"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    name, driver, memory = (word.strip() for word in done.stdout.splitlines()[0].split(","))
    return {"name": name, "driver": driver, "memory": memory}


def matmul_ceiling(dtype: str) -> float:
    """Operations a second of a large matrix product in ``dtype`` on random data, in a process of its own.

    The best of several: what the arithmetic units of this machine can reach through torch.
    """
    code = (
        "import sys, time, torch\n"
        "dtype = getattr(torch, sys.argv[1]); cuda = torch.cuda.is_available()\n"
        "n, device = (8192, 'cuda') if cuda else (2048, 'cpu')\n"
        "a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))\n"
        "wait = torch.cuda.synchronize if cuda else (lambda: None)\n"
        "best = 0.0\n"
        "for _ in range(8):\n"
        "    wait(); start = time.perf_counter()\n"
        "    for _ in range(10 if cuda else 1): c = a @ b\n"
        "    wait(); best = max(best, (10 if cuda else 1) * 2 * n**3 / (time.perf_counter() - start))\n"
        "print(best)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, dtype], capture_output=True, text=True, check=True)
    return float(done.stdout)
