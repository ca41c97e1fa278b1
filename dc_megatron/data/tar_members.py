"""Which files a tar holds and where their bytes are: one pass over the headers, contents skipped.

Python's tarfile makes an object of every member and takes a tar that was cut off for a complete one. Names are keys and
nothing else here: nothing is ever written where a tar says.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZEROS = bytes(BLOCK)
# Names and extended headers are read into memory; what claims to be longer is damaged or hostile.
_LONGEST_TEXT = 1 << 20
_PLAIN = frozenset((b"0", b"\0", b"7"))
_HARD_LINK, _SYMBOLIC_LINK = b"1", b"2"
# Links, devices, folders and pipes: no content, whatever their size field says.
_EMPTY = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
# Headers about the member behind them: long names (GNU), extended (POSIX), global (POSIX, ignored).
_AHEAD = frozenset((b"L", b"K", b"x", b"X", b"g"))


class DamagedTar(ValueError):
    """What is wrong with a tar, and at which byte."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file: its name without ``./``, the byte its content starts at, its size. ``target``: the name a link means."""

    name: bytes
    offset: int
    size: int
    target: bytes | None = None


def scan(file: BinaryIO, total: int) -> Iterator[Member]:
    """The files and links of an uncompressed tar of ``total`` bytes, in order.

    Raises DamagedTar at the first place that is no tar; what is before it has been given by then. A tar without the two
    empty blocks at its end is complete if it ends where a member does.
    """
    position, ahead = 0, {}
    while position < total:
        header = _read(file, position, BLOCK)
        if header == _ZEROS:
            return
        kind, size = header[156:157], _size(header, ahead, position)
        content = position + BLOCK
        # Some writers leave out the filling of the last block.
        if content + size > total:
            raise DamagedTar(f"the member at byte {position} has {size} bytes, and the file ends before that")
        if kind in _AHEAD:
            ahead |= _told_ahead(kind, file, content, size)
        else:
            member = _member(header, kind, content, size, ahead)
            if member is not None:
                yield member
            ahead = {}
        position = content + -(-size // BLOCK) * BLOCK


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) < size:
        raise DamagedTar(f"it ends inside the header at byte {position}")
    return data


def _size(header: bytes, ahead: dict[bytes, bytes], position: int) -> int:
    """Bytes of content behind ``header``; DamagedTar where its checksum is wrong, which counts itself as spaces."""
    checksum = header[148:156]
    try:
        right = sum(header) - sum(checksum) + 8 * ord(" ") == _number(checksum)
        kind = header[156:157]
        size = 0 if kind in _EMPTY else _number(header[124:136])
        if b"size" in ahead and kind not in _EMPTY | _AHEAD:
            size = int(ahead[b"size"])
    except ValueError:
        right = False
    if not right or size < 0:
        raise DamagedTar(f"no tar header at byte {position}")
    return size


def _number(field: bytes) -> int:
    """A number field: octal digits, or in base 256 behind a byte 0x80, as GNU writes large ones."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("negative")
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _told_ahead(kind: bytes, file: BinaryIO, content: int, size: int) -> dict[bytes, bytes]:
    """What a header says about the next member: ``path``, ``linkpath``, ``size`` and others."""
    if kind == b"g":
        return {}
    if size > _LONGEST_TEXT:
        raise DamagedTar(f"a name of {size} bytes at byte {content}")
    text = _read(file, content, size)
    if kind in (b"L", b"K"):
        return {b"path" if kind == b"L" else b"linkpath": text.split(b"\0")[0]}
    records, start = {}, 0
    while start < len(text) and text[start : start + 1] != b"\0":
        # "<length of all of this> <key>=<value>\n"
        digits = text[start : start + 20].split(b" ")[0]
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = text[start + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if end <= start or not equals:
            raise DamagedTar(f"an extended header at byte {content} that cannot be read")
        records[key] = value
        start = end
    return records


def _member(header: bytes, kind: bytes, content: int, size: int, ahead: dict[bytes, bytes]) -> Member | None:
    """The file or link of ``header``; None for folders, devices and files with holes (their bytes are not in order)."""
    name = ahead.get(b"path") or _name(header)
    if kind in (_HARD_LINK, _SYMBOLIC_LINK):
        target = ahead.get(b"linkpath") or _text(header[157:257])
        # A hard link's target is a member; a symbolic link's starts from its own folder.
        base = posixpath.dirname(name) if kind == _SYMBOLIC_LINK else b""
        return Member(posixpath.normpath(name), content, 0, posixpath.normpath(posixpath.join(base, target)))
    if kind not in _PLAIN or name.endswith(b"/") or any(key.startswith(b"GNU.sparse.") for key in ahead):
        return None
    return Member(posixpath.normpath(name), content, size)


def _name(header: bytes) -> bytes:
    name = _text(header[:100])
    # Only the POSIX form has a second part of the name at this place.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(field: bytes) -> bytes:
    return field.split(b"\0")[0]
