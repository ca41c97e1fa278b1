"""One process of a node builds the index, the others wait: through files, because no process group exists yet.

The builder writes ``build-<host>.json`` twice a second: progress, then completion or the error's words. It names the
group of processes that were started together, so that the remains of an earlier run are not taken for this one's.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time

from dc_megatron.config import DataConfig
from dc_megatron.data.index import (
    Progress,
    SampleIndex,
    build_index,
    check_summary,
    index_key,
    open_index,
    read_summary,
)
from dc_megatron.data.index_summary import write_json
from dc_megatron.errors import UserError

_BEAT_SECONDS = 0.5
_POLL_SECONDS = 0.2


def build_or_wait(
    config: DataConfig,
    folder: str,
    local_rank: int,
    *,
    progress: Progress | None = None,
    start_timeout: float = 120.0,
    stale_timeout: float = 60.0,
) -> SampleIndex:
    """The opened index of ``config`` in ``folder``; local rank 0 builds it where need be, other ranks wait for it.

    progress(done, total) is called on every rank. Raises the builder's UserError on every rank of the node, within
    about a second of it; UserError too where the builder died, did not begin within ``start_timeout`` seconds, or
    gave no sign of life for ``stale_timeout`` seconds.
    """
    if local_rank == 0:
        return _build(config, folder, progress)
    return _wait(config, folder, progress, start_timeout, stale_timeout)


def _build(config: DataConfig, folder: str, progress: Progress | None) -> SampleIndex:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder for the data index cannot be made: {error}") from None
    status = _Status(folder)

    def report(done: int, total: int) -> None:
        status.update(done=done, total=total)
        if progress is not None:
            progress(done, total)

    try:
        build_index(config, folder, report)
        index = open_index(folder)
    except BaseException as error:
        words = str(error) if isinstance(error, UserError) else f"building the data index failed: {error!r}"
        status.finish(state="failed", message=words)
        raise
    status.finish(state="done", key=index.summary.key)
    return index


class _Status:
    """The builder's status file, rewritten with a rising ``beat`` by a thread until ``finish``."""

    def __init__(self, folder: str):
        self._path = _status_path(folder)
        self._content = {"state": "building", "launch": _launch(), "pid": os.getpid(), "beat": 0, "done": 0, "total": 0}
        self._finished = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="index-heartbeat", daemon=True)
        self._thread.start()

    def update(self, **values) -> None:
        self._content.update(values)

    def finish(self, **values) -> None:
        self._finished.set()
        self._thread.join()
        self._content.update(values)
        self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._content, "written": time.time()})

    def _beat(self) -> None:
        while not self._finished.wait(_BEAT_SECONDS):
            self._content["beat"] += 1
            self._write()


def _wait(
    config: DataConfig, folder: str, progress: Progress | None, start_timeout: float, stale_timeout: float
) -> SampleIndex:
    key = index_key(config)
    launch = _launch()
    waiting_since = time.time()
    beat, last_sign = None, time.monotonic()
    while True:
        summary = read_summary(folder)
        if summary is not None and summary.key == key:
            check_summary(summary, config)
            return open_index(folder)
        status = _read_status(folder)
        # The remains of an earlier run were written before this wait, by another launch.
        if status is not None and (status["launch"] == launch or status["written"] >= waiting_since):
            if status["state"] == "failed":
                raise UserError(status["message"])
            if status["state"] == "done":
                _check_done(status, key, folder)
            if status["beat"] != beat:
                beat, last_sign = status["beat"], time.monotonic()
            if progress is not None:
                progress(status["done"], status["total"])
            # Looked at twice: a builder that ended well wrote its last word before it went.
            if not _alive(status["pid"]) and _read_status(folder) == status:
                raise UserError(
                    f"local rank 0 (process {status['pid']}) died while it built the data index in {folder}"
                )
        silent, limit = time.monotonic() - last_sign, start_timeout if beat is None else stale_timeout
        if silent > limit:
            raise UserError(
                f"no sign of local rank 0 building the data index in {folder} for {limit:.0f} s; see its output,"
                " and whether all ranks of the node share that folder"
            )
        time.sleep(_POLL_SECONDS)


def _check_done(status: dict, key: str, folder: str) -> None:
    """A finished builder with another key means that the ranks were given different data or settings."""
    if status["key"] != key:
        raise UserError(
            f"local rank 0 built a different data index in {folder} than this rank needs; start all ranks with the"
            " same flags and the same files"
        )


def _status_path(folder: str) -> str:
    return os.path.join(folder, f"build-{platform.node()}.json")


def _read_status(folder: str) -> dict | None:
    try:
        with open(_status_path(folder), encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _launch() -> str:
    """What the processes of one launch on a node share: the process that started them, and torchrun's restart number.

    Shells between torchrun's agent and this process are passed over: they carry LOCAL_RANK, the agent does not.
    """
    parent = os.getppid()
    while _has_local_rank(parent) and (fields := _process_fields(parent)):
        parent = int(fields[1])
    fields = _process_fields(parent)
    # The start in clock ticks since boot (field 22) keeps reused process ids apart.
    started = fields[19] if fields else ""
    return f"{parent}:{started}:{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _has_local_rank(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return any(entry.startswith(b"LOCAL_RANK=") for entry in file.read().split(b"\0"))
    return False


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not yet collected by its parent does not."""
    if fields := _process_fields(pid):
        return fields[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (the second may hold spaces); empty where there is no such file."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
    return []
