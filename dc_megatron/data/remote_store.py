"""Pictures in an object store or on a server, through fsspec: any address ``scheme://...``, with retries."""

from __future__ import annotations

import io
import re
import urllib.parse
from collections.abc import Callable
from typing import BinaryIO

from dc_megatron.data.image_store import HEADER_BYTES, ImageStore, check_size, frames_of, safe_name, shown
from dc_megatron.data.retrying import Retrying
from dc_megatron.errors import UserError


class RemoteFiles:
    """Ranges, sizes and listings of the files that one fsspec file system has; paths as that file system spells them.

    Every call is retried. Raises FileNotFoundError, PermissionError, and OSError after the last try.
    """

    def __init__(self, location: str, retrying: Retrying | None):
        import fsspec.core

        self._retrying = retrying or Retrying()
        try:
            self._system, self.root = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            scheme = location.split("://")[0]
            raise UserError(
                f"--image_folder {without_secrets(location)}: {scheme}:// cannot be read: {error}"
            ) from None
        except Exception as error:
            raise UserError(f"--image_folder {without_secrets(location)}: {type(error).__name__}: {error}") from None

    @property
    def is_web(self) -> bool:
        """Plain web servers can neither list a folder nor say that it is there."""
        return self.root.startswith(("http://", "https://"))

    def whole(self, path: str) -> bytes:
        return self._ask(path, lambda: self._system.cat_file(path))

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``, fewer where the file ends before."""

        def ranged() -> bytes:
            try:
                data = self._system.cat_file(path, start=start, end=end)
            except Exception as error:
                if _is_past_the_end(error):
                    return b""
                raise
            # A server that knows no ranges sends everything.
            return data if len(data) <= end - start else data[start:end]

        return self._ask(path, ranged)

    def size(self, path: str) -> int:
        return int(self.facts(path)["size"])

    def facts(self, path: str) -> dict:
        """What fsspec tells of a file or folder: ``size``, ``type`` and what the store has beside."""
        return self._ask(path, lambda: self._system.info(path))

    def entries(self, path: str) -> list[dict]:
        return self._ask(path, lambda: self._system.ls(path, detail=True))

    def matching(self, pattern: str) -> list[str]:
        return sorted(self._ask(pattern, lambda: self._system.glob(pattern)))

    def _ask(self, path: str, function: Callable):
        try:
            return self._retrying.call(without_secrets(shown(path)), function)
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(*error.args) from None


class RemoteStore(ImageStore):
    """Files below an address. A picture costs one request, a header one request of ``block_bytes``."""

    def __init__(self, location: str, *, retrying: Retrying | None = None):
        self.location = without_secrets(location)
        self._files = RemoteFiles(location, retrying)
        self._root = self._files.root.rstrip("/")
        if not self._files.is_web:
            self._check_there()

    def open(self, name: str, block_bytes: int = HEADER_BYTES) -> BinaryIO:
        path = self._path(name)
        raw = RangeFile(lambda start, end: self._files.fetch(path, start, end), lambda: self._files.size(path))
        file = io.BufferedReader(raw, block_bytes)
        # The first block comes now, so that a missing file is told here.
        file.peek(1)
        return file

    def read(self, name: str) -> bytes:
        data = self._files.whole(self._path(name))
        check_size(len(data), self.where(name))
        return data

    def list(self, name: str) -> list[str]:
        path = self._path(name)
        entries = self._files.entries(path)
        names = [str(entry["name"]).rstrip("/") for entry in entries if entry["type"] == "file"]
        if names == [path]:
            raise FileNotFoundError(f"{self.where(name)}: a file, not a folder")
        return frames_of(name, [one.rsplit("/", 1)[-1] for one in names])

    def _path(self, name: str) -> str:
        name = safe_name(name)
        return f"{self._root}/{urllib.parse.quote(name) if self._files.is_web else name}"

    def _check_there(self) -> None:
        try:
            self._files.facts(self._root or self._files.root)
        except FileNotFoundError:
            raise UserError(f"--image_folder {self.location}: nothing is stored there") from None
        except OSError as error:
            raise UserError(f"--image_folder {self.location}: cannot be read: {error}") from None


class RangeFile(io.RawIOBase):
    """A seekable file made of ``fetch(start, end)``; ``size()`` is asked only by who seeks from the end."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: Callable[[], int]):
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._position = 0
        # Where a fetch came short: the end is there, and nothing behind it is asked for.
        self._end: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = max(0, (self._size() if start is None else start) + offset)
        return self._position

    def readinto(self, buffer) -> int:
        if self._end is not None and self._position >= self._end:
            return 0
        data = self._fetch(self._position, self._position + len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        if len(data) < len(buffer):
            self._end = self._position
        return len(data)

    def readall(self) -> bytes:
        # The inherited one asks for small pieces.
        self._end = self._size() if self._end is None else self._end
        data = self._fetch(self._position, self._end) if self._position < self._end else b""
        self._position += len(data)
        return data


def without_secrets(location: str) -> str:
    """An address without the ``user:password@`` that it may carry."""
    return re.sub(r"://[^/@]*@", "://", location)


def _is_past_the_end(error: Exception) -> bool:
    """Whether a store refused a range because the file ends before it, an empty file's first byte included."""
    return getattr(error, "status", None) == 416 or "InvalidRange" in str(error)
