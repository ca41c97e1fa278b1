"""Where pictures lie: a folder, tar shards (WebDataset), or an object store; one interface to read them by name.

A store is made from its location, a text, so every process makes its own. Names come out of data files and are not
trusted: what would leave the location is refused before anything is opened.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO

from dc_megatron.config import DataSource
from dc_megatron.errors import UserError

if TYPE_CHECKING:
    from dc_megatron.data.retrying import Retrying

# Files of a folder of frames that are taken as frames.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# A file that is read whole is a picture; a larger one would only fill the memory.
MAX_WHOLE_BYTES = 1 << 30
# One read of so many bytes holds nearly every image header.
HEADER_BYTES = 64 * 1024


class UnsafeName(ValueError):
    """A name that is absolute, leaves its location with ``..``, or no file system takes."""


class ImageStore(ABC):
    """Files below one location, read by relative names with ``/``. Safe to use from several threads at once.

    Every method raises FileNotFoundError where there is no such file (or folder), ``UnsafeName`` for names that lead
    out of the location, and another OSError where reading fails, for remote stores after their retries.
    """

    location: str

    @abstractmethod
    def open(self, name: str, block_bytes: int = HEADER_BYTES) -> BinaryIO:
        """A seekable binary file. Reads fetch about ``block_bytes`` at once where fetching is slow."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file; OSError above MAX_WHOLE_BYTES."""

    @abstractmethod
    def list(self, name: str) -> list[str]:
        """Names of the pictures directly inside folder ``name``, as ``open`` takes them; frame2 before frame10."""

    def where(self, name: str) -> str:
        """``name`` with its location, for messages."""
        return os.path.join(self.location, shown(name))


def open_store(location: str, *, cache: str | None = None, retrying: Retrying | None = None) -> ImageStore:
    """The store at ``location``: a folder; ``a.tar``, ``shards/{000..099}.tar`` or ``shards/*.tar``; ``scheme://...``.

    An empty location takes plain paths as names, absolute ones too. cache: a folder that keeps the list of a tar's
    members, which is read anew by every process otherwise. retrying: for remote stores. UserError: nothing is there.
    """
    if os.path.isdir(location):
        return FolderStore(location)
    if re.search(r"\.(tgz|tar\.\w+)$", location.lower()):
        raise UserError(
            f"--image_folder {location}: a compressed tar has to be unpacked up to a picture to reach it; store it as"
            " an uncompressed .tar (pictures do not shrink)"
        )
    if location.endswith(".tar"):
        from dc_megatron.data.tar_store import TarStore

        return TarStore(location, cache=cache, retrying=retrying)
    if "://" in location:
        from dc_megatron.data.remote_store import RemoteStore

        return RemoteStore(location, retrying=retrying)
    return FolderStore(location)


def open_stores(sources: Iterable[DataSource], *, cache: str | None = None) -> list[ImageStore]:
    """The store of every data source, in order; sources at one location share theirs. ``cache``: see ``open_store``."""
    sources = list(sources)
    stores = {location: open_store(location, cache=cache) for location in {one.image_folder: None for one in sources}}
    return [stores[source.image_folder] for source in sources]


class FolderStore(ImageStore):
    """A folder of the file system; with location "" plain paths. Links that users made inside it are followed."""

    def __init__(self, location: str):
        if location and not os.path.isdir(location):
            raise UserError(f"--image_folder {location}: no such folder")
        self.location = location

    def open(self, name: str, block_bytes: int = HEADER_BYTES) -> BinaryIO:
        path = self._path(name)
        try:
            # A pipe would block, a device may never end.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FileNotFoundError(errno.ENOENT, "a folder or no plain file", shown(path))
            return open(path, "rb")
        except OSError as error:
            raise _missing(error, path) from None

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            check_size(os.fstat(file.fileno()).st_size, self.where(name))
            return file.read()

    def list(self, name: str) -> list[str]:
        path = self._path(name)
        try:
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
        except OSError as error:
            raise _missing(error, path) from None
        return frames_of(name, names)

    def _path(self, name: str) -> str:
        if not self.location:
            return checked_text(name)
        if os.path.isabs(name):
            # Some data files carry whole paths; what lies inside the folder is no way out of it.
            inside = os.path.relpath(checked_text(name), os.path.abspath(self.location))
            name = name if inside.split(os.sep, 1)[0] == os.pardir else inside
        return os.path.join(self.location, safe_name(name))


def safe_name(name: str) -> str:
    """``name`` without ``.`` and ``..``; UnsafeName where it would lead out of its location.

    Only the text is looked at, so a link that a user put into the folder may lead anywhere. A backslash counts as a
    separator here, because it is one on other systems.
    """
    checked_text(name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name):
        raise UnsafeName(f"{shown(name)}: an absolute name; names start from the image folder")
    depth = 0
    for part in re.split(r"[/\\]", name):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        if depth < 0:
            raise UnsafeName(f"{shown(name)}: leads out of the image folder")
    path = os.path.normpath(name) if name else "."
    if path == ".":
        raise FileNotFoundError(errno.ENOENT, "an empty name", shown(name))
    return path


def checked_text(name: str) -> str:
    """``name`` where it can be a path at all: UnsafeName for NUL, FileNotFoundError for text that has no bytes."""
    if "\0" in name:
        raise UnsafeName(f"{shown(name)}: has a NUL character")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise FileNotFoundError(errno.ENOENT, "not a text of valid characters", shown(name)) from None
    return name


def frames_of(folder: str, names: Iterable[str]) -> list[str]:
    """The pictures among the file names of ``folder``, as names below the store, in natural order."""
    frames = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    return [f"{folder.rstrip('/')}/{name}" for name in sorted(frames, key=natural_order)]


def natural_order(name: str) -> tuple[Sequence, str]:
    """A key that sorts numbers inside names by their value."""
    parts = re.split(r"([0-9]+)", name)
    # Odd places are digits. int() refuses thousands of them, and no frame has such a number.
    return [(int(part[-18:]) if place % 2 else 0, part) for place, part in enumerate(parts)], name


def check_size(size: int, where: str) -> None:
    """Raise OSError for a file that is too large to be read whole."""
    if size > MAX_WHOLE_BYTES:
        raise OSError(errno.EFBIG, f"has {size} bytes (limit {MAX_WHOLE_BYTES})", where)


def shown(name: str) -> str:
    """``name`` as messages show it: one printable line, shortened."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 200 else f"{text[:140]}... ({len(name)} characters)"


def _missing(error: OSError, path: str) -> OSError:
    """FileNotFoundError for whatever says that no file can be at ``path``; other errors as they are."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return FileNotFoundError(errno.ENOENT, error.strerror, shown(path))
    return error
