"""Files that are whole or not there: written under a temporary name, flushed to disk, hashed on the way, then renamed.

Every write, flush and rename of a conversion, of a save beside the engine's own files, and of a manifest goes through
``write_all``, ``flush_file``, ``flush_folder``, ``rename`` and ``exchange``, so that a test can stop the program at
each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from dc_megatron.errors import UserError

_BLOCK = 1 << 24
_JOURNAL = "journal.jsonl"
_LOCK = ".lock"
# As in manifest.py, which rests on this file.
_MANIFEST = "dc_manifest.json"


@dataclass(frozen=True)
class Digest:
    """Size in bytes and xxh3 (64 bit, 16 hex digits) of a file's content."""

    size: int
    xxh3_64: str


def write_all(descriptor: int, data) -> None:
    """Write all of ``data`` (bytes-like) at the descriptor's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def flush_file(descriptor: int) -> None:
    """Wait until what was written is on disk."""
    os.fsync(descriptor)


def flush_folder(folder: str) -> None:
    """Wait until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: str, target: str) -> None:
    """Give ``source`` the name ``target``, in place of what had it, and wait until that is on disk."""
    os.replace(source, target)
    flush_folder(os.path.dirname(os.path.abspath(target)))


def exchange(one: str, other: str) -> bool:
    """Let two existing names change places in one step, and wait until that is on disk.

    False, and nothing has happened, where the file system cannot do that (network disks, mostly).
    """
    at_working_folder, exchange_names = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(at_working_folder, names[0], at_working_folder, names[1], exchange_names):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise OSError(number, os.strerror(number), one, None, other)
    for folder in {os.path.dirname(os.path.abspath(name)) for name in (one, other)}:
        flush_folder(folder)
    return True


class HashedFile:
    """A file written from its start to its end, hashed on the way. As a context it is closed without being finished."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._hash = xxhash.xxh3_64()
        self.size = 0

    def write(self, data) -> int:
        """Append bytes-like ``data``; returns its length in bytes, as torch.save expects of a file."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        write_all(self._descriptor, view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back; torch.save calls it."""

    def finish(self) -> Digest:
        """Flush to disk and close."""
        flush_file(self._descriptor)
        self.close()
        return Digest(self.size, self._hash.hexdigest())

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def write_file(path: str, data: bytes) -> Digest:
    """Write a small file so that a reader sees the old one or the whole new one, also after a power cut."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with HashedFile(temporary) as file:
            file.write(data)
            digest = file.finish()
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    return digest


def hash_file(path: str, progress: Callable[[int], object] | None = None, flush: bool = False) -> Digest:
    """Digest of a file on disk, read once in blocks. ``progress`` is told the bytes of each block.

    ``flush``: wait as well until what others wrote into it is on disk.
    """
    digest, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        # A small file needs no large buffer, and most files of a checkpoint folder are small.
        buffer = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1)))
        if flush:
            flush_file(file.fileno())
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if progress is not None:
                progress(count)
    return Digest(size, digest.hexdigest())


class PartialFolder:
    """A folder that appears under its name only when it is whole, by one rename of ``FOLDER.partial``.

    ``plan`` says what is being made of what, in bytes that change when either does. An earlier attempt at the same plan
    goes on: files that it finished, by its journal, are kept; everything else in it is removed. As a context it leaves
    the attempt for a later one where ``finish`` was not called. A link to an empty folder is followed. UserError: the
    folder exists and is not empty or cannot be renamed to, another process is at work on it, or ``FOLDER.partial`` is
    not ours.
    """

    def __init__(self, folder: str, plan: str, flag: str = "--save"):
        self._what = f"{flag} {folder}"
        self._refuse_existing(os.path.abspath(folder))
        self.folder = os.path.realpath(folder)
        self.path = self.folder + ".partial"
        self._refuse_what_is_not_ours()
        os.makedirs(self.path, exist_ok=True)
        self._lock = self._take_lock()
        self.finished: dict[str, Digest] = {}
        self.notes: dict[str, object] = {}
        self._journal: HashedFile | None = None
        try:
            self._refuse_existing(self.folder)
            if not self._take_up(plan):
                self._empty(keep=())
                self._journal = HashedFile(self._inside(_JOURNAL))
                self._note({"plan": plan})
        except BaseException:
            self.close()
            raise

    def _refuse_existing(self, folder: str) -> None:
        if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
            raise UserError(f"{self._what}: is there already; nothing is overwritten: give a new or empty folder")
        if os.path.ismount(folder):
            raise UserError(f"{self._what}: a disk is mounted there, which no rename replaces; give a folder inside it")

    def _refuse_what_is_not_ours(self) -> None:
        """A folder of that name which no attempt has made would be emptied."""
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"{self._what}: {self.path} is in the way; move it, or give another name")
        # Every attempt begins with its lock; what is whole and lacks its last rename has a manifest instead.
        names = {name for _, _, found in os.walk(self.path) for name in found}
        if names and not names & {_LOCK, _JOURNAL, _MANIFEST}:
            raise UserError(
                f"{self._what}: would be made in {self.path}, which is there and holds something else; move that, or"
                " give another name"
            )

    def _inside(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _take_lock(self) -> int:
        busy = UserError(f"{self._what}: another process is writing {self.path}; wait for it")
        try:
            descriptor = os.open(self._inside(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise busy from None  # it gave the folder its name just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock on a file that its owner has removed meanwhile keeps nobody out.
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._inside(_LOCK))):
                raise BlockingIOError
        except OSError:
            os.close(descriptor)
            raise busy from None
        return descriptor

    def close(self) -> None:
        """Let go of the folder; what is finished in it waits for the next attempt."""
        if self._journal is not None:
            self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _take_up(self, plan: str) -> bool:
        """Whether an earlier attempt at the same plan is here; its finished files are then known."""
        try:
            with open(self._inside(_JOURNAL), "rb") as file:
                lines = file.read().split(b"\n")
            # The last line is empty, or was cut off by whatever ended the attempt.
            entries = [json.loads(line) for line in lines[:-1]]
            if entries[0] != {"plan": plan}:
                return False
            for entry in entries[1:]:
                name, digest = entry["file"], Digest(entry["size"], entry["xxh3_64"])
                path = self._inside(name)
                if os.path.isfile(path) and os.path.getsize(path) == digest.size:
                    self.finished[name], self.notes[name] = digest, entry["note"]
        except (OSError, ValueError, LookupError, TypeError):
            self.finished, self.notes = {}, {}
            return False
        self._empty(keep=self.finished)
        # Written anew rather than appended to: the old one may end in half a line.
        known, notes = self.finished, self.notes
        self.finished, self.notes = {}, {}
        self._journal = HashedFile(self._inside(_JOURNAL + ".new"))
        self._note({"plan": plan})
        for name, digest in known.items():
            self.record(name, digest, notes[name])
        rename(self._inside(_JOURNAL + ".new"), self._inside(_JOURNAL))
        return True

    def _empty(self, keep) -> None:
        kept = {_LOCK, _JOURNAL, *keep} if keep else {_LOCK}
        for parent, folders, names in os.walk(self.path, topdown=False):
            for name in names:
                if os.path.relpath(os.path.join(parent, name), self.path) not in kept:
                    os.remove(os.path.join(parent, name))
            for name in folders:
                path = os.path.join(parent, name)
                if os.path.islink(path):
                    os.remove(path)
                elif not os.listdir(path):
                    os.rmdir(path)

    def _note(self, entry: dict) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")
        flush_file(self._journal._descriptor)

    def create(self, name: str) -> HashedFile:
        """A new file at ``name`` below the folder; ``record`` it when it is finished."""
        path = self._inside(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return HashedFile(path)

    def record(self, name: str, digest: Digest, note: object = None) -> None:
        """Declare a file finished, so that a later attempt keeps it. ``note``: JSON that the attempt will need."""
        self._note({"file": name, "size": digest.size, "xxh3_64": digest.xxh3_64, "note": note})
        self.finished[name] = digest
        self.notes[name] = note

    def write(self, name: str, data: bytes) -> Digest:
        """A small file in one go, recorded."""
        with self.create(name) as file:
            file.write(data)
            digest = file.finish()
        self.record(name, digest)
        return digest

    def copy(self, source: str, name: str) -> Digest:
        """A copy of the file ``source``, recorded."""
        with open(source, "rb", buffering=0) as original, self.create(name) as file:
            while block := original.read(_BLOCK):
                file.write(block)
            digest = file.finish()
        self.record(name, digest)
        return digest

    def refuse_small_disk(self, needed: int) -> None:
        """UserError where ``needed`` bytes, less those finished, do not fit on the disk."""
        still = needed - sum(digest.size for digest in self.finished.values())
        free = shutil.disk_usage(self.path).free
        if still > free:
            raise UserError(
                f"{self._what}: needs {still / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room or"
                " give a folder on another disk"
            )

    def finish(self) -> None:
        """Give the folder its name."""
        self._journal.close()
        os.remove(self._inside(_JOURNAL))
        os.remove(self._inside(_LOCK))
        for parent, _, _ in os.walk(self.path):
            flush_folder(parent)
        rename(self.path, self.folder)
        self.close()
