"""Pictures inside tar shards (WebDataset): members are listed once, then read by their place in the shard."""

from __future__ import annotations

import bisect
import glob
import io
import os
import re
from typing import BinaryIO

import pyarrow as pa

from dc_megatron.data.image_store import HEADER_BYTES, ImageStore, check_size, frames_of, safe_name, shown
from dc_megatron.data.remote_store import RangeFile, RemoteFiles, without_secrets
from dc_megatron.data.retrying import Retrying
from dc_megatron.data.tar_list import member_list
from dc_megatron.errors import UserError

_MOST_SHARDS = 1_000_000
_REMOTE_BLOCK = 1 << 20


class LocalFiles:
    """Shards of a file system, with the calls of ``RemoteFiles`` that a tar needs."""

    def fetch(self, path: str, start: int, end: int) -> bytes:
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.pread(handle, end - start, start)
        finally:
            os.close(handle)

    def facts(self, path: str) -> dict:
        facts = os.stat(path)
        return {"size": facts.st_size, "mtime": facts.st_mtime_ns}

    def matching(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern))

    def reader(self, path: str, size: int) -> BinaryIO:
        """The shard, to be scanned. A small buffer: contents between headers are jumped over."""
        return open(path, "rb", buffering=4096)


class RemoteShards(RemoteFiles):
    """Shards behind an address. Scanning moves most of a shard once, unless its members are large."""

    def reader(self, path: str, size: int) -> BinaryIO:
        raw = RangeFile(lambda start, end: self.fetch(path, start, min(end, size)), lambda: size)
        return io.BufferedReader(raw, _REMOTE_BLOCK)


class TarStore(ImageStore):
    """Members of uncompressed tars by name, or by ``shard/name``: the shard without folder, with or without .tar.

    A plain name means the first shard that has it. ``cache``, ``retrying``: see ``open_store``.
    """

    def __init__(self, location: str, *, cache: str | None = None, retrying: Retrying | None = None):
        self.location = without_secrets(location)
        remote = "://" in location
        self._files = RemoteShards(location, retrying) if remote else LocalFiles()
        self._shards = _shards(self._files, self._files.root if remote else location, self.location)
        self._numbers: dict[str, int] = {}
        for number, path in enumerate(self._shards):
            base = path.rsplit("/", 1)[-1]
            self._numbers.setdefault(base, number)
            self._numbers.setdefault(base.removesuffix(".tar"), number)
        members = member_list(self._files, self._shards, cache, self.location)
        self._names, self._in_shard, self._offsets, self._sizes = (
            _single(members, one) for one in members.column_names
        )

    def open(self, name: str, block_bytes: int = HEADER_BYTES) -> BinaryIO:
        path, offset, size = self._place(name)

        def fetch(start: int, end: int) -> bytes:
            return self._files.fetch(path, offset + start, offset + min(end, size)) if start < size else b""

        return io.BufferedReader(RangeFile(fetch, lambda: size), block_bytes)

    def read(self, name: str) -> bytes:
        path, offset, size = self._place(name)
        check_size(size, self.where(name))
        data = self._files.fetch(path, offset, offset + size) if size else b""
        if len(data) < size:
            raise OSError(f"{self.where(name)}: {path} has become shorter since it was listed")
        return data

    def list(self, name: str) -> list[str]:
        folder = safe_name(name)
        found = self._inside(folder, None)
        head, _, rest = folder.partition("/")
        if not found and rest and head in self._numbers:
            found = self._inside(rest, self._numbers[head])
        if not found:
            raise FileNotFoundError(f"{self.where(name)}: no such folder in the shards")
        return frames_of(folder, (one for one in found if "/" not in one))

    def _place(self, name: str) -> tuple[str, int, int]:
        """(shard's path, first byte, size) of a member."""
        name = safe_name(name)
        row = self._row(name, None)
        head, _, rest = name.partition("/")
        if row is None and rest and head in self._numbers:
            row = self._row(rest, self._numbers[head])
        if row is None:
            raise FileNotFoundError(f"{shown(name)}: no such member in {self.location}")
        return self._shards[self._in_shard[row].as_py()], self._offsets[row].as_py(), self._sizes[row].as_py()

    def _row(self, name: str, shard: int | None) -> int | None:
        """The first row of the list with ``name``, in ``shard`` if one is given."""
        wanted = os.fsencode(name)
        row = self._first(wanted)
        while row < len(self._names) and self._names[row].as_py() == wanted:
            if shard is None or self._in_shard[row].as_py() == shard:
                return row
            row += 1
        return None

    def _first(self, name: bytes) -> int:
        """The first row whose name does not sort before ``name``."""
        return bisect.bisect_left(range(len(self._names)), name, key=lambda row: self._names[row].as_py())

    def _inside(self, folder: str, shard: int | None) -> set[str]:
        """Names below ``folder``, counted from there."""
        prefix = os.fsencode(folder) + b"/"
        found, row = set(), self._first(prefix)
        while row < len(self._names) and (name := self._names[row].as_py()).startswith(prefix):
            if shard is None or self._in_shard[row].as_py() == shard:
                found.add(os.fsdecode(name[len(prefix) :]))
            row += 1
        return found


def _single(table: pa.Table, column: str) -> pa.Array:
    """A column in one piece, so that a row is found without going through pieces."""
    pieces = table[column]
    return pieces.chunk(0) if pieces.num_chunks == 1 else pieces.combine_chunks()


def _shards(files: LocalFiles | RemoteShards, pattern: str, location: str) -> list[str]:
    """Paths of the shards that ``a.tar``, ``{000..099}.tar`` or ``*.tar`` means, in order. UserError: there is none."""
    paths = []
    for path in _ranges(pattern, location):
        if re.search(r"[*?\[]", path):
            try:
                paths += files.matching(path)
            except OSError as error:
                raise UserError(f"--image_folder {location}: cannot be listed: {error}") from None
        else:
            paths.append(path)
    if not paths:
        raise UserError(f"--image_folder {location}: no such .tar")
    return paths


def _ranges(pattern: str, location: str) -> list[str]:
    """``{08..10}`` written out, with leading zeros as in its first number."""
    found = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_SHARDS:
        raise UserError(f"--image_folder {location}: {found[0]} is no range of up to {_MOST_SHARDS} numbers")
    names = (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
    paths = [
        path for name in names for path in _ranges(pattern[: found.start()] + name + pattern[found.end() :], location)
    ]
    if len(paths) > _MOST_SHARDS:
        raise UserError(f"--image_folder {location}: means {len(paths)} shards (limit {_MOST_SHARDS})")
    return paths
