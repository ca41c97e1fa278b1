"""The records of a JSON list or a JSON Lines file, a chunk at a time: memory does not grow with the file.

Cutting a file into records and parsing them are apart: the first is cheap and has to go in order, the second is
dear and can be done by many. A list is cut at the commas of its outermost level, lines at line feeds. If all pieces
are JSON, so is the file, and what is not JSON shows when its piece is parsed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dc_megatron.data.faults import RecordFault
from dc_megatron.errors import UserError

BLOCK_BYTES = 4 << 20
RECORDS_PER_CHUNK = 512
# Beyond this the end of a record is not looked for any further: most likely a quote is missing.
MOST_RECORD_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_IS_MARK = bytes(chr(code) in '"[]{},' for code in range(256))
_STEP = np.array([(chr(code) in "[{") - (chr(code) in "]}") for code in range(256)], dtype=np.int64)


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file as text.

    path, flag: the file, and the flag that named it. first: number of the first record. start: byte of the file where
    ``text`` begins. ends: int64, where in ``text`` each piece ends; one byte, the separator, is left out between two.
    records: how many there are. lines: blank pieces are no records. next_start: byte of the file behind it.
    """

    path: str
    flag: str
    first: int
    start: int
    text: bytes
    ends: np.ndarray
    records: int
    lines: bool

    @property
    def next_start(self) -> int:
        return self.start + len(self.text) + 1


def json_chunks(path: str, flag: str = "--data_path") -> Iterator[Chunk]:
    """The file in chunks of at most RECORDS_PER_CHUNK records, the same ones every time.

    UserError: no such file, no record in it, text before or behind a list, a list or record without an end.
    """
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        with open(path, "rb") as file:
            start = _first_byte(file)
            is_list = file.read(1) == b"["
            file.seek(start + is_list)
            cut = _cut_list(file, path, flag) if is_list else _cut_lines(file, path, flag)
            records = 0
            for span_start, text, ends in cut:
                for chunk in _split(path, flag, records, span_start, text, ends, not is_list):
                    records += chunk.records
                    yield chunk
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error}") from None
    if not records:
        raise UserError(f"{flag} {path}: holds no record; give a LLaVA JSON list or JSON Lines")


def parse_chunk(chunk: Chunk) -> Iterator[tuple[int, object]]:
    """(number, record) of every record; where it is JSON that Python cannot hold, a RecordFault in its place.

    UserError, with file, line and column: not UTF-8, or not JSON.
    """
    number, position = chunk.first, 0
    for end in chunk.ends.tolist():
        piece = chunk.text[position:end]
        if not (chunk.lines and _is_blank(piece)):
            yield number, _parse(piece, chunk.path, chunk.flag, chunk.start + position)
            number += 1
        position = end + 1


def _parse(piece: bytes, path: str, flag: str, start: int):
    """The record in ``piece``, which lies at byte ``start`` of the file."""
    text = ""
    try:
        text = piece.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        line, _ = _place(path, start + error.start)
        raise UserError(f"{flag} {path}: line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise _not_json(path, flag, start + len(text[: error.pos].encode()), error.msg) from None
    except RecursionError:
        return RecordFault(RecordFault.STRUCTURE, "nested too deeply")
    except ValueError as error:  # such as a number of more digits than Python converts
        return RecordFault(RecordFault.STRUCTURE, f"JSON that cannot be held: {error}")


def _not_json(path: str, flag: str, position: int, words: str) -> UserError:
    line, column = _place(path, position)
    return UserError(f"{flag} {path}: line {line}, column {column}: not valid JSON: {words}")


def _place(path: str, position: int) -> tuple[int, int]:
    """(line, column in characters) of a byte of the file, both from 1."""
    lines, column = 1, 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, BLOCK_BYTES))):
            position -= len(block)
            if line_feeds := block.count(b"\n"):
                lines, column = lines + line_feeds, 1
            codes = np.frombuffer(block[block.rfind(b"\n") + 1 :], dtype=np.uint8)
            column += int(np.count_nonzero((codes & 0xC0) != 0x80))  # not the later bytes of a character
    return lines, column


def _first_byte(file) -> int:
    """Where the first byte that is neither a byte order mark nor white space stands; the file is left there."""
    position = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(position)
    while block := file.read(BLOCK_BYTES):
        rest = block.lstrip(_SPACE)
        position += len(block) - len(rest)
        if rest:
            break
    file.seek(position)
    return position


def _split(path: str, flag: str, first: int, start: int, text: bytes, ends: np.ndarray, lines: bool):
    """Chunks of RECORDS_PER_CHUNK pieces of a span of whole pieces."""
    position = 0
    for number in range(0, len(ends), RECORDS_PER_CHUNK):
        some = ends[number : number + RECORDS_PER_CHUNK]
        part = text[position : some[-1]]
        relative = some - position
        records = len(some)
        if lines:
            records = sum(not _is_blank(piece) for piece in _pieces(part, relative))
        if records:
            yield Chunk(path, flag, first, start + position, part, relative, records, lines)
        first += records
        position = int(some[-1]) + 1


def _pieces(text: bytes, ends: np.ndarray) -> Iterator[bytes]:
    position = 0
    for end in ends.tolist():
        yield text[position:end]
        position = end + 1


def _is_blank(piece: bytes) -> bool:
    return not piece or piece.isspace()


class _Pending:
    """The text since the last cut, collected over blocks. ``start``: its byte in the file."""

    def __init__(self, path: str, flag: str, start: int):
        self._path, self._flag = path, flag
        self.start, self.blocks, self.size = start, [], 0

    def add(self, block: bytes) -> None:
        self.blocks.append(block)
        self.size += len(block)
        if self.size > MOST_RECORD_BYTES:
            text = self.text()
            line, column = _place(self._path, self.start + len(text) - len(text.lstrip(_SPACE)))
            raise UserError(
                f"{self._flag} {self._path}: line {line}, column {column}: a record of more than"
                f" {MOST_RECORD_BYTES >> 20} MB begins here; is a quote or a bracket missing?"
            )

    def text(self) -> bytes:
        return b"".join(self.blocks)

    def up_to(self, block: bytes, cuts: np.ndarray) -> tuple[int, bytes, np.ndarray]:
        """(start, text, ends) of the pieces that end at ``cuts`` of ``block``; what follows is pending."""
        last = int(cuts[-1])
        span = (self.start, self.text() + block[:last], cuts + self.size)
        self.start += self.size + last + 1
        self.blocks, self.size = [], 0
        self.add(block[last + 1 :])
        return span


def _cut_lines(file, path: str, flag: str) -> Iterator[tuple[int, bytes, np.ndarray]]:
    """Spans of whole lines from where ``file`` stands. Only line feeds count: JSON may hold U+2028 unescaped."""
    pending = _Pending(path, flag, file.tell())
    while block := file.read(BLOCK_BYTES):
        cuts = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
        if len(cuts):
            yield pending.up_to(block, cuts)
        else:
            pending.add(block)
    if pending.size:
        yield pending.start, pending.text(), np.array([pending.size])


def _cut_list(file, path: str, flag: str) -> Iterator[tuple[int, bytes, np.ndarray]]:
    """Spans of whole elements; ``file`` stands behind the opening bracket."""
    pending = _Pending(path, flag, file.tell())
    depth, inside, held, elements = 1, 0, b"", 0
    while more := file.read(BLOCK_BYTES):
        block = held + more
        # A backslash at the end belongs to what comes next.
        held = b"\\" if (len(block) - len(block.rstrip(b"\\"))) % 2 else b""
        block = block[: len(block) - len(held)]
        found, kinds, inside = _structure(block, inside)
        depths = depth + np.cumsum(_STEP[kinds])
        closed = np.flatnonzero(depths == 0)
        if len(closed):
            end = int(found[closed[0]])
            cuts = found[: closed[0]][(kinds[: closed[0]] == ord(",")) & (depths[: closed[0]] == 1)]
            last = pending.text() if not len(cuts) else b""
            is_empty = not elements and not len(cuts) and _is_blank(last + block[:end])
            if not is_empty:
                yield pending.up_to(block[: end + 1], np.append(cuts, end))
            _check_end(file, block[end:] + held, path, flag)
            return
        depth = int(depths[-1]) if len(depths) else depth
        cuts = found[(kinds == ord(",")) & (depths == 1)]
        if len(cuts):
            elements += len(cuts)
            yield pending.up_to(block, cuts)
        else:
            pending.add(block)
    rest = pending.text() + held
    _parse(rest, path, flag, pending.start)
    raise _not_json(path, flag, pending.start + len(rest), "the list has no end")


def _structure(block: bytes, inside: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(positions, codes) of brackets and commas outside of strings; whether a string is open behind ``block``.

    inside: 1 where a string is open before it, else 0. ``block`` ends outside of an escape.
    """
    # From the left, so a quote stays exactly where an even number of backslashes stands before it.
    masked = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    found = np.flatnonzero(np.frombuffer(masked.translate(_IS_MARK), dtype=bool))
    kinds = np.frombuffer(masked, dtype=np.uint8)[found]
    quotes = kinds == ord('"')
    open_strings = (np.cumsum(quotes) + inside) & 1
    outside = (open_strings == 0) & ~quotes
    return found[outside], kinds[outside], int(open_strings[-1]) if len(found) else inside


def _check_end(file, rest: bytes, path: str, flag: str) -> None:
    """``rest`` begins with the list's closing bracket; only white space may follow, there and in ``file`` behind it."""
    position = file.tell() - len(rest)
    if rest[:1] != b"]":
        raise _not_json(path, flag, position, "Expecting ',' delimiter")
    position, rest = position + 1, rest[1:]
    while rest or (rest := file.read(BLOCK_BYTES)):
        if text := rest.lstrip(_SPACE):
            raise _not_json(path, flag, position + len(rest) - len(text), "Extra data")
        position, rest = position + len(rest), b""
