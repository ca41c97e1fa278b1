"""Weights of a Hugging Face folder, whatever the files: safetensors or old .bin, one file or many with an index.

Names, shapes and places come from the headers; the rows and columns asked for are read by pread when they are asked
for, so memory does not grow with the files. Nothing from a .bin file is executed (torch_zip.py).
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings

import torch
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.weights import torch_zip
from dc_megatron.weights.positioned_reads import PositionedFile
from dc_megatron.weights.tensor_reader import InMemory, TensorReader
from dc_megatron.weights.torch_zip import BrokenArchive, TensorPlace
from dc_megatron.weights.weight_files import find_weights

_LENGTH_BYTES = 8
# The safetensors library's own limit.
_LONGEST_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
}
# Rows are read in blocks of about this size where only some of their columns are kept.
_BLOCK_BYTES = 64 << 20
Range = tuple[int, int]


class PlacedFile:
    """The tensors of one file whose bytes can be read in place; a TensorReader. ``metadata``: its own strings."""

    def __init__(self, file: PositionedFile, places: dict[str, TensorPlace], metadata: dict[str, str], what: str):
        self.path, self.metadata = file.path, metadata
        self._file, self._places, self._what = file, places, what

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def position(self, name: str) -> tuple:
        return (self._places[name].offset,)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        place = self._places[name]
        assert 0 <= start <= end <= place.shape[0], f"{name}: rows {start} to {end} of {place.shape[0]}"
        assert out.shape == (end - start, *place.shape[1:]), f"{name}: rows into a buffer of {tuple(out.shape)}"
        assert out.dtype == place.dtype, f"{name}: {place.dtype} into a buffer of {out.dtype}"
        try:
            torch_zip.read_rows(self._file, place, start, end, out)
        except (OSError, EOFError) as error:
            raise UserError(f"{self._what}: {self.path} cannot be read ({error}); fetch it again") from None

    def read(self, name: str, rows: Range | None, columns: Range | None) -> Tensor:
        """The tensor or a part of it, in memory of its own."""
        place = self._places[name]
        if rows is not None:
            # A rank that reads its rows would have the kernel fetch those of the next rank: 8 MB at each jump, and a
            # fifth more than it needs, as seen on a disk that reads ahead that far.
            self._file.stop_read_ahead()
        if not place.shape:
            value = torch.empty(1, dtype=place.dtype)
            PlacedFile(self._file, {name: _one_row(place)}, {}, self._what).read_rows(name, 0, 1, value)
            return value[0].clone()
        start, end = rows or (0, place.shape[0])
        if columns is None or not place.contiguous:
            whole = torch.empty(end - start, *place.shape[1:], dtype=place.dtype)
            self.read_rows(name, start, end, whole)
            return whole if columns is None else whole[:, slice(*columns)].clone()
        kept = torch.empty(end - start, columns[1] - columns[0], *place.shape[2:], dtype=place.dtype)
        height = max(1, min(end - start, _BLOCK_BYTES // max(1, place.row_bytes)))
        block = torch.empty(height, *place.shape[1:], dtype=place.dtype)
        for first in range(start, end, height):
            count = min(height, end - first)
            self.read_rows(name, first, first + count, block[:count])
            kept[first - start : first - start + count] = block[:count, slice(*columns)]
        return kept


class LoadedFile(InMemory):
    """The tensors of a .bin file from before torch 1.6, which has to be loaded as a whole."""

    def __init__(self, path: str, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.path, self.metadata = path, {}
        self._all = tensors

    def read(self, name: str, rows: Range | None, columns: Range | None) -> Tensor:
        """The tensor or a part of it, in memory of its own."""
        tensor = self._all[name]
        if rows is not None:
            tensor = tensor[slice(*rows)]
        return (tensor if columns is None else tensor[:, slice(*columns)]).clone()


class Checkpoint(TensorReader):
    """All tensors of a folder by name."""

    def __init__(self, files: list[PlacedFile | LoadedFile], what: str):
        self._file_of: dict[str, PlacedFile | LoadedFile] = {}
        self._numbers = {file.path: number for number, file in enumerate(files)}
        for file in files:
            for name in file.names():
                if name in self._file_of:
                    raise UserError(f"{what}: {name} is both in {self._file_of[name].path} and in {file.path}")
                self._file_of[name] = file

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """dtype on file."""
        return self._file_of[name].dtype(name)

    def position(self, name: str) -> tuple:
        """(number of the file, byte offset)."""
        file = self._file_of[name]
        return (self._numbers[file.path], *file.position(name))

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        """Fill ``out``, [end - start, ...] contiguous in the file's dtype on the CPU, with rows start to end."""
        self._file_of[name].read_rows(name, start, end, out)

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> Tensor:
        """The tensor, or the half-open range of its rows and columns, in the file's dtype on the CPU.

        It is in memory of its own. A range of columns reads whole rows, in blocks of 64 MB, and drops the others:
        a tensor-parallel rank at TP 2 then reads 1.29 times its shards with a 7B Llama's proportions (29 percent of the
        weights, the output and down projections, are read whole), and every byte once.
        """
        return self._file_of[name].read(name, rows, columns)


def open_checkpoint(folder: str, flag: str = "--model_name_or_path") -> Checkpoint:
    """Open the weights of ``folder``; UserError where they are missing, incomplete or corrupt."""
    what = f"{flag} {folder}"
    names, weight_map = find_weights(folder, what)
    files = {name: open_file(os.path.join(folder, name), what) for name in names}
    for shard, file in files.items():
        lost = {name for name, place in weight_map.items() if place == shard}.difference(file.names())
        if lost:
            raise UserError(f"{what}: the index says that {sorted(lost)[0]} is in {shard}; it is not there")
    return Checkpoint(list(files.values()), what)


def open_file(path: str, what: str) -> PlacedFile | LoadedFile:
    """One file of weights by its ending; UserError where it is broken. Nothing but headers is read."""
    if path.endswith(".safetensors"):
        return _open_safetensors(path, what)
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if not is_zip:
        return LoadedFile(path, _load_old_bin(path, what))
    try:
        file = PositionedFile(path)
        return PlacedFile(file, torch_zip.find_tensors(file), {}, what)
    except (BrokenArchive, EOFError, OSError) as error:
        raise UserError(f"{what}: {path} is corrupt or holds more than tensors ({error}); fetch it again") from None


def _one_row(place: TensorPlace) -> TensorPlace:
    return TensorPlace((1,), place.dtype, place.offset, (1,))


def _load_old_bin(path: str, what: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on protocols; what counts is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken pickle raises: struct, pickle, EOF, Runtime
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what}: {path} is corrupt or holds more than tensors ({reason}); fetch it again") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{what}: {path} is not a table of tensors by name")
    return content


def _open_safetensors(path: str, what: str) -> PlacedFile:
    """An 8-byte length, a JSON object, then the tensors' bytes, without overlap or hole."""
    file = PositionedFile(path)
    length = struct.unpack("<Q", file.read(0, _LENGTH_BYTES))[0] if file.size >= _LENGTH_BYTES else None
    if length is None or length > file.size - _LENGTH_BYTES:
        raise UserError(f"{what}: {path} is truncated or no safetensors file ({file.size} bytes); fetch it again")
    if length > _LONGEST_HEADER:
        raise UserError(f"{what}: {path} has a header of {length} bytes; safetensors allows {_LONGEST_HEADER}")
    try:
        entries = json.loads(file.read(_LENGTH_BYTES, length).decode("utf-8"), object_pairs_hook=_without_doubles)
        metadata = entries.pop("__metadata__", {})
        start = _LENGTH_BYTES + length
        places = {name: _place(name, entry, start) for name, entry in entries.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no strings")
        end = _end_of_data(places, start)
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        reason = f" ({error})" if type(error) is ValueError else ""
        raise UserError(f"{what}: the header of {path} is corrupt{reason}; fetch it again") from None
    if file.size != end:
        raise UserError(f"{what}: {path} has {file.size} bytes where its header asks for {end}; fetch it again")
    return PlacedFile(file, places, metadata, what)


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def _place(name: str, entry: dict, start: int) -> TensorPlace:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name[:80]} has the unknown dtype {str(entry['dtype'])[:40]}")
    numbers = [*shape, begin, end]
    if len(entry) != 3 or not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
        raise ValueError(f"shape or offsets of {name[:80]} are no sizes")
    dtype = _DTYPES[entry["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]} has {end - begin} bytes, not those of its shape and dtype")
    return TensorPlace(tuple(shape), dtype, start + begin, _strides(shape))


def _strides(shape: list[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return tuple(strides)


def _end_of_data(places: dict[str, TensorPlace], start: int) -> int:
    for place in sorted(places.values(), key=lambda place: (place.offset, place.numel)):
        if place.offset != start:
            raise ValueError("tensors in it overlap or leave a hole")
        start += place.numel * place.dtype.itemsize
    return start
