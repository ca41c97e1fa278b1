"""Where a benchmark keeps its checkpoints: one folder that it made, with room checked first and removed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil

from dc_megatron.benchmark.checkpoint_shapes import is_written, num_bytes, shape_of, write_checkpoint
from dc_megatron.errors import UserError

SOURCE = "source"


class WorkFolder:
    """``FOLDER/dc-benchmark-SHAPE`` with a ``source`` checkpoint in it, as a context.

    Whatever an earlier run left there is removed, but a source that is what is asked for. At the end all is removed,
    with ``keep`` all but the source. ``copies``: how many checkpoints of full size will lie beside the source at once.
    UserError: no room, or another benchmark is at work in FOLDER, which would spoil both.
    """

    def __init__(
        self, folder: str, shape: str, layers: int | None, sparse: bool = False, copies: int = 0, keep: bool = False
    ):
        self.path = os.path.join(os.path.abspath(folder), f"dc-benchmark-{shape}")
        self.size = num_bytes(shape_of(shape, layers))
        self._what = f"--folder {folder}"
        self._lock = -1
        self._arguments = (shape, layers, sparse)
        self._copies, self._keep = copies, keep

    def __enter__(self) -> WorkFolder:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self._take_lock()
        os.makedirs(self.path, exist_ok=True)
        written = is_written(self.inside(SOURCE), *self._arguments)
        self._remove_all_but(SOURCE if written else "")
        try:
            sparse = self._arguments[2]
            self._refuse_small_disk(self._copies + (0 if written or sparse else 1))
            write_checkpoint(self.inside(SOURCE), *self._arguments)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._remove_all_but(SOURCE if self._keep else "")
        if not os.listdir(self.path):
            os.rmdir(self.path)
        os.close(self._lock)

    def _take_lock(self) -> None:
        """The folder itself is locked, so nothing has to be cleared away after a benchmark that was killed."""
        self._lock = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self._what}: another benchmark is at work there; wait for it") from None

    def inside(self, name: str) -> str:
        """The path of something in the folder."""
        return os.path.join(self.path, name)

    def remove(self, name: str) -> None:
        """Remove a folder in it and what an interrupted conversion left of it."""
        for path in (self.inside(name), self.inside(name + ".partial")):
            if os.path.isdir(path):
                shutil.rmtree(path)

    def _remove_all_but(self, kept: str) -> None:
        for name in os.listdir(self.path):
            if name != kept:
                self.remove(name)

    def _refuse_small_disk(self, copies: int) -> None:
        needed = int(copies * self.size * 1.02)  # headers and side files
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"{self._what}: needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; give --layers"
                " for fewer layers, or a folder on another disk"
            )


def size_below(folder: str) -> int:
    """Bytes of all files below ``folder``, by their lengths."""
    return sum(os.path.getsize(path) for path in files_below([folder]))


def files_below(folders: list[str]):
    """Paths of all files below ``folders``."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            yield from (os.path.join(parent, name) for name in names)
