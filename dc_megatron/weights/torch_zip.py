"""Where tensors lie inside a torch.save archive, so that their bytes can be read without loading the archive.

An archive may be a whole file (``.bin``) or a region of one (a chunk in a ``.distcp`` file). It is a zip of stored
entries: ``PREFIX/data.pkl`` says which tensor is which part of which storage, ``PREFIX/data/KEY`` are the storages.
Only the zip's directory, data.pkl and the storages' headers are read. The pickle is read as data (safe_pickle.py).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dc_megatron.weights import safe_pickle
from dc_megatron.weights.positioned_reads import PositionedFile
from dc_megatron.weights.safe_pickle import Constructor, RefusedPickle

# Far above what real archives need: 160,000 tensors, and names of 400 bytes for each of them.
_LARGEST_DIRECTORY = 16 << 20
_LARGEST_PICKLE = 64 << 20
_NEAR = 4096

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


class BrokenArchive(ValueError):
    """Not an archive that torch.save wrote, or a damaged one. The message is a part of a sentence."""


@dataclass(frozen=True)
class TensorPlace:
    """A tensor inside a file: ``offset`` is the byte of its first element, ``stride`` counts elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its bytes lie together in the order of its elements, so that rows are runs of bytes."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, both included."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a contiguous tensor."""
        return self.numel // self.shape[0] * self.dtype.itemsize if self.numel else 0

    def select(self, index: int) -> TensorPlace:
        """The tensor at ``index`` of the first dimension."""
        offset = self.offset + index * self.stride[0] * self.dtype.itemsize
        return TensorPlace(self.shape[1:], self.dtype, offset, self.stride[1:])


@dataclass(frozen=True)
class _Entry:
    name: str
    header: int
    size: int


@dataclass(frozen=True)
class _Storage:
    """``numel`` elements of ``dtype`` (None: bytes) from byte ``offset`` of the file."""

    dtype: torch.dtype | None
    offset: int
    num_bytes: int


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DTYPES: dict[tuple[str, str], torch.dtype] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


def _size(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(part) is int and 0 <= part < 1 << 48 for part in value):
        raise RefusedPickle("a shape or stride in it is broken")
    return tuple(value)


def _rebuild(storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None) -> TensorPlace:
    if type(storage) is not _Storage or type(offset) is not int or offset < 0 or not isinstance(dtype, torch.dtype):
        raise RefusedPickle("a tensor in it has no storage, or a wrong place in it")
    shape, stride = _size(size), _size(stride)
    if len(shape) != len(stride):
        raise RefusedPickle("a tensor in it has a shape and a stride of different lengths")
    place = TensorPlace(shape, dtype, storage.offset + offset * dtype.itemsize, stride)
    if place.numel and (offset + place.extent) * dtype.itemsize > storage.num_bytes:
        raise RefusedPickle(f"a tensor of shape {list(shape)} in it is larger than its storage")
    return place


def _rebuild_v2(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorPlace:
    return _rebuild(storage, offset, size, stride, getattr(storage, "dtype", None))


def _rebuild_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *rest) -> TensorPlace:
    return _rebuild(storage, offset, size, stride, dtype)


def _parameter(data: object, *rest: object) -> object:
    if type(data) is not TensorPlace:
        raise RefusedPickle("a parameter in it holds no tensor")
    return data


TENSOR_NAMES: dict[tuple[str, str], object] = {
    **safe_pickle.COMMON_NAMES,
    **DTYPES,
    **{("torch", name): Constructor(f"torch.{name}", _parameter) for name in _STORAGE_DTYPES},
    ("torch.storage", "UntypedStorage"): Constructor("torch.storage.UntypedStorage", _parameter),
    ("torch", "Size"): Constructor("torch.Size", lambda value=(): _size(value)),
    ("torch._utils", "_rebuild_tensor_v2"): Constructor("_rebuild_tensor_v2", _rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Constructor("_rebuild_tensor_v3", _rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): Constructor("_rebuild_parameter", _parameter),
}


class Archive:
    """The archive in bytes [offset, offset + length) of ``file``. BrokenArchive where it is none."""

    def __init__(self, file: PositionedFile, offset: int = 0, length: int | None = None):
        self._file, self._start = file, offset
        self._length = file.size - offset if length is None else length
        if offset < 0 or self._length < _END.size or offset + self._length > file.size:
            raise BrokenArchive("is truncated or no archive of torch.save")
        # An archive of one tensor has its directory near its end, its pickle and the first storage near its start.
        self._head = file.read(offset, min(_NEAR, self._length))
        tail = min(_NEAR, self._length)
        self._tail_start = self._length - tail
        self._tail = self._head if self._length <= _NEAR else file.read(offset + self._tail_start, tail)
        self._entries = self._read_directory()
        self._prefix = self._find_prefix()

    def load(self, names: Mapping[tuple[str, str], object]) -> object:
        """What data.pkl holds, by the names allowed; tensors as TensorPlace. BrokenArchive for everything else."""
        try:
            return safe_pickle.load(self.pickle_bytes(), names, self._storage)
        except RefusedPickle as error:
            raise BrokenArchive(f"is refused: {error}") from None

    def pickle_bytes(self) -> bytes:
        """The bytes of data.pkl."""
        entry = self._entries[self._prefix + "data.pkl"]
        if entry.size > _LARGEST_PICKLE:
            raise BrokenArchive(f"has a data.pkl of {entry.size} bytes; at most {_LARGEST_PICKLE} are read")
        return self._read(self._data_start(entry), entry.size)

    def _read(self, offset: int, length: int) -> bytes:
        """Bytes at ``offset`` of the archive, from what was read already where they are there."""
        if offset < 0 or length < 0 or offset + length > self._length:
            raise BrokenArchive("is damaged: a part of it lies beyond its end")
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        if offset >= self._tail_start:
            return self._tail[offset - self._tail_start : offset - self._tail_start + length]
        return self._file.read(self._start + offset, length)

    def _read_directory(self) -> dict[str, _Entry]:
        count, size, offset = self._find_directory()
        if size > _LARGEST_DIRECTORY or count * _ENTRY.size > size:
            raise BrokenArchive(f"has a directory of {count} entries in {size} bytes; that is no archive of torch.save")
        data = self._read(offset, size)
        entries: dict[str, _Entry] = {}
        place = 0
        for _ in range(count):
            if place + _ENTRY.size > size:
                raise BrokenArchive("has a damaged directory")
            fields = _ENTRY.unpack_from(data, place)
            name_length, extra_length, comment_length = fields[10:13]
            end = place + _ENTRY.size + name_length
            name = data[place + _ENTRY.size : end].decode("utf-8", "replace")
            entry = _entry(fields, name, data[end : end + extra_length])
            if name in entries:
                raise BrokenArchive(f"has the entry {name[:80]} twice")
            entries[name] = entry
            place = end + extra_length + comment_length
        if place != size:
            raise BrokenArchive("has a damaged directory")
        return entries

    def _find_directory(self) -> tuple[int, int, int]:
        """Number of entries, bytes and offset of the directory."""
        end = self._length - _END.size
        signature, disk, first_disk, here, count, size, offset, comment = _END.unpack(self._read(end, _END.size))
        if signature != b"PK\5\6" or comment or disk != first_disk or here != count:
            raise BrokenArchive("is truncated or no archive of torch.save (no zip directory at its end)")
        if count == 0xFFFF or size == 0xFFFFFFFF or offset == 0xFFFFFFFF:
            place = _END64_PLACE.unpack(self._read(end - _END64_PLACE.size, _END64_PLACE.size))
            record = _END64.unpack(self._read(place[2], _END64.size))
            if place[0] != b"PK\6\7" or record[0] != b"PK\6\6":
                raise BrokenArchive("has a damaged directory")
            count, size, offset = record[7:10]
        return count, size, offset

    def _find_prefix(self) -> str:
        found = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise BrokenArchive("is no archive of torch.save (no data.pkl)")
        prefix = found[0].removesuffix("data.pkl")
        order = self._entries.get(prefix + "byteorder")
        if order is not None and (order.size != 6 or self._read(self._data_start(order), 6) != b"little"):
            raise BrokenArchive("was written on a big-endian machine")
        return prefix

    def _data_start(self, entry: _Entry) -> int:
        """Where an entry's bytes begin, from the start of the archive: its local header says how long that is."""
        fields = _LOCAL.unpack(self._read(entry.header, _LOCAL.size))
        name_length, extra_length = fields[9:11]
        name = self._read(entry.header + _LOCAL.size, name_length)
        if fields[0] != b"PK\3\4" or name.decode("utf-8", "replace") != entry.name or fields[3] != 0:
            raise BrokenArchive(f"is damaged at its entry {entry.name[:80]}")
        start = entry.header + _LOCAL.size + name_length + extra_length
        if start + entry.size > self._length:
            raise BrokenArchive(f"is truncated: its entry {entry.name[:80]} lies beyond its end")
        return start

    def _storage(self, reference: object) -> _Storage:
        """``reference``: ("storage", kind, key, device, number of elements)."""
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise RefusedPickle("it refers to something other than a storage")
        _, kind, key, _, numel = reference
        entry = self._entries.get(f"{self._prefix}data/{key}") if isinstance(key, str) else None
        if type(kind) is not Constructor or entry is None or type(numel) is not int or numel < 0:
            raise RefusedPickle("it refers to a storage that the archive has not")
        dtype = _STORAGE_DTYPES.get(kind.name.removeprefix("torch."))
        num_bytes = numel * (1 if dtype is None else dtype.itemsize)
        if num_bytes > entry.size:
            raise RefusedPickle(f"it asks for {num_bytes} bytes of storage {key}, which has {entry.size}")
        return _Storage(dtype, self._start + self._data_start(entry), num_bytes)


def _entry(fields: tuple, name: str, extra: bytes) -> _Entry:
    flags, method, packed, size, header = fields[3], fields[4], fields[8], fields[9], fields[16]
    if method != 0 or flags & 1:
        raise BrokenArchive(f"has a compressed or encrypted entry {name[:80]}; torch.save stores entries as they are")
    wide = {"size": size, "packed": packed, "header": header}
    # Fields that do not fit in 32 bits stand in an extra field, in this order, those only that are needed.
    missing = [key for key, value in wide.items() if value == 0xFFFFFFFF]
    values = _wide_values(extra, len(missing)) if missing else ()
    wide.update(zip(missing, values, strict=True))
    if wide["size"] != wide["packed"]:
        raise BrokenArchive(f"has an entry {name[:80]} of two sizes")
    return _Entry(name, wide["header"], wide["size"])


def _wide_values(extra: bytes, count: int) -> tuple[int, ...]:
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1 and length >= 8 * count and place + 4 + 8 * count <= len(extra):
            return struct.unpack_from(f"<{count}Q", extra, place + 4)
        place += 4 + length
    raise BrokenArchive("has a damaged directory")


def find_tensors(file: PositionedFile) -> dict[str, TensorPlace]:
    """The tensors of a whole file that torch.save wrote from a table of tensors by name. BrokenArchive otherwise."""
    content = Archive(file).load(TENSOR_NAMES)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and type(place) is TensorPlace for name, place in content.items()
    ):
        raise BrokenArchive("is not a table of tensors by name")
    return content


def find_tensor(file: PositionedFile, offset: int, length: int) -> TensorPlace:
    """The one tensor that torch.save wrote into a region of a file. BrokenArchive otherwise."""
    place = Archive(file, offset, length).load(TENSOR_NAMES)
    if type(place) is not TensorPlace:
        raise BrokenArchive("holds no tensor")
    return place


def read_rows(file: PositionedFile, place: TensorPlace, start: int, end: int, out: Tensor) -> None:
    """Fill ``out``, [end - start, ...] contiguous, with rows. EOFError where the file has become shorter.

    A tensor that is not contiguous (a view) is read as a whole into memory first: checkpoints hardly have any.
    """
    if place.contiguous:
        file.read_tensor(out, place.offset + start * place.row_bytes)
    else:
        storage = torch.empty(place.extent, dtype=place.dtype)
        file.read_tensor(storage, place.offset)
        out.copy_(torch.as_strided(storage, place.shape, place.stride)[start:end])
