"""Weights of a Hugging Face folder, whatever the files: safetensors or old .bin, one file or many with an index.

Names and shapes come from the headers; a tensor, or the rows and columns asked for, is read when it is needed.
Nothing from a .bin file is executed: it is loaded weights-only.
"""

from __future__ import annotations

import json
import os
import struct

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.weights.weight_files import find_weights

_LENGTH_BYTES = 8


class SafetensorsFile:
    """One .safetensors file; a UserError where its header is broken or does not fit the file's size."""

    def __init__(self, path: str, what: str):
        self.path = path
        self.entries, self.metadata = _read_header(path, what)
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise UserError(f"{what}: {path} is corrupt ({error}); fetch it again") from None

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def read(self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> Tensor:
        if rows is None and columns is None:
            return self._file.get_tensor(name)
        part = self._file.get_slice(name)
        rows = slice(*(rows or (0, self.shape(name)[0])))
        return part[rows] if columns is None else part[rows, slice(*columns)]


class BinFile:
    """One torch.save file of tensors by name, memory-mapped where its format allows."""

    def __init__(self, path: str, what: str):
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = load_bin(path, what)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> Tensor:
        tensor = self._tensors[name]
        if rows is not None:
            tensor = tensor[slice(*rows)]
        return tensor if columns is None else tensor[:, slice(*columns)]


class Checkpoint:
    """All tensors of a folder by name."""

    def __init__(self, files: list[SafetensorsFile | BinFile], what: str):
        self._file_of: dict[str, SafetensorsFile | BinFile] = {}
        for file in files:
            for name in file.names():
                if name in self._file_of:
                    raise UserError(f"{what}: {name} is both in {self._file_of[name].path} and in {file.path}")
                self._file_of[name] = file

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def read(self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or the half-open range of its rows and columns, in the file's dtype on the CPU.

        It may share memory with the file: copy it before changing it.
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


def open_file(path: str, what: str) -> SafetensorsFile | BinFile:
    """One file of weights by its ending."""
    return SafetensorsFile(path, what) if path.endswith(".safetensors") else BinFile(path, what)


def load_bin(path: str, what: str) -> dict[str, Tensor]:
    """The tensors of a torch.save file, weights-only; UserError where it is corrupt or holds anything else."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            # The format before torch 1.6 cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken pickle or archive raises: zipfile, struct, pickle, EOF, Runtime
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what}: {path} is corrupt or holds more than tensors ({reason}); fetch it again") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{what}: {path} is not a table of tensors by name")
    return content


def _read_header(path: str, what: str) -> tuple[dict[str, dict], dict[str, str]]:
    """The entries and the metadata of a .safetensors file: an 8-byte length, a JSON object, then the tensors' bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else None
        if length is None or length > size - _LENGTH_BYTES:
            raise UserError(f"{what}: {path} is truncated or no safetensors file ({size} bytes); fetch it again")
        try:
            entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", {})
            end = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, AttributeError, TypeError, LookupError):
            raise UserError(f"{what}: the header of {path} is corrupt; fetch it again") from None
    if size != end:
        raise UserError(f"{what}: {path} has {size} bytes where its header asks for {end}; fetch it again")
    return entries, metadata
