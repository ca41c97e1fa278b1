"""The rows of an epoch in one numpy file: written under a temporary name, checked before it is believed.

int64, little-endian, one-dimensional: xxh3 of all that follows, format, rows, samples, ``starts``, ``samples``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator

import numpy as np
import xxhash

from dc_megatron.data.packing import Rows

_FORMAT = 1
_HEAD = 4
_PREFIX = "rows-"
_LOCK = "rows.lock"
_LOCK_SECONDS = 300

logger = logging.getLogger(__name__)


def plan_path(folder: str, key: str, epoch: int) -> str:
    """Where the rows of ``epoch`` lie that belong to ``key``."""
    return os.path.join(folder, f"{_PREFIX}{key}-{epoch}.npy")


def read_plan(path: str) -> Rows | None:
    """The rows of a file, mapped into memory; None where there is no file, or a damaged one, which is said."""
    try:
        content = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        return _damaged(path, str(error))
    if content.dtype != np.dtype("<i8") or content.ndim != 1 or len(content) < _HEAD:
        return _damaged(path, "not a list of 8-byte integers")
    checksum, form, rows, _ = content[:_HEAD].tolist()
    if checksum != _checksum(content[1:]) or form != _FORMAT:
        return _damaged(path, "its content is not what was written")
    starts = content[_HEAD : _HEAD + rows + 1]
    return Rows(content[_HEAD + rows + 1 :], starts)


def write_plan(path: str, rows: Rows) -> None:
    """Store ``rows`` whole or not at all. A folder that cannot be written to is said, and nothing else."""
    content = np.concatenate([[0, _FORMAT, len(rows), len(rows.samples)], rows.starts, rows.samples]).astype("<i8")
    content[0] = _checksum(content[1:])
    temporary = f"{path}.{platform.node()}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.save(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        logger.warning("%s: the plan of rows cannot be stored and stays in memory: %s", path, error)


def remove_other_plans(folder: str, key: str) -> None:
    """Take away what other data or settings left in ``folder``; who still reads one of them keeps it mapped."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(_PREFIX) and not name.startswith(f"{_PREFIX}{key}-"):
                os.remove(os.path.join(folder, name))


@contextlib.contextmanager
def one_at_a_time(folder: str) -> Iterator[None]:
    """Only one process is inside for ``folder``, as far as the disk knows locks; a lock ends with its process.

    Who waited too long goes in as well: planning twice gives the same rows.
    """
    descriptor = None
    try:
        descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        give_up = time.monotonic() + _LOCK_SECONDS
        while not _locked(descriptor) and time.monotonic() < give_up:
            time.sleep(0.05)
    except OSError as error:
        logger.info("%s: rows are planned without a lock: %s", folder, error)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _checksum(content: np.ndarray) -> int:
    # One bit less, because the sign has none to spare.
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(content)) >> 1


def _damaged(path: str, why: str) -> None:
    logger.warning("%s: cannot be used (%s); the rows are planned anew", path, why)
    return
