"""Named tensors that can be read row by row: what every format is on the way through a conversion.

Converters, writers and comparisons take a ``TensorReader`` and never know what lies behind it. Rows are those of the
first dimension; a block of rows is read into memory that the caller owns, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class TensorReader(Protocol):
    """Tensors by name. Every tensor has at least one dimension."""

    def names(self) -> list[str]:
        """All names, in no particular order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from headers alone."""

    def dtype(self, name: str) -> torch.dtype:
        """dtype as stored."""

    def position(self, name: str) -> tuple:
        """Where it lies, such as (file number, byte offset): sorting by it gives the order that reads forward."""

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        """Fill ``out``, [end - start, ...] contiguous in the stored dtype on the CPU, with rows start to end."""


class Renamed:
    """``reader`` under other names: ``names`` maps new name -> its name there. What is not listed is left out."""

    def __init__(self, reader: TensorReader, names: Mapping[str, str]):
        self._reader, self._names = reader, dict(names)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._names[name])

    def position(self, name: str) -> tuple:
        return self._reader.position(self._names[name])

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        self._reader.read_rows(self._names[name], start, end, out)


class Merged:
    """Several readers as one; their names must differ."""

    def __init__(self, readers: Sequence[TensorReader]):
        self._home: dict[str, tuple[int, TensorReader]] = {}
        for number, reader in enumerate(readers):
            for name in reader.names():
                assert name not in self._home, f"{name} comes from two readers"
                self._home[name] = (number, reader)

    def names(self) -> list[str]:
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name][1].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._home[name][1].dtype(name)

    def position(self, name: str) -> tuple:
        number, reader = self._home[name]
        return (number, *reader.position(name))

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        self._home[name][1].read_rows(name, start, end, out)


class InMemory:
    """A few small tensors, such as a projector."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._numbers = {name: number for number, name in enumerate(self._tensors)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def position(self, name: str) -> tuple:
        return (self._numbers[name], 0)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        out.copy_(self._tensors[name][start:end])


def read_tensor(reader: TensorReader, name: str) -> Tensor:
    """A whole tensor in memory of its own, in the stored dtype."""
    tensor = torch.empty(reader.shape(name), dtype=reader.dtype(name))
    reader.read_rows(name, 0, tensor.shape[0], tensor)
    return tensor


def num_bytes(reader: TensorReader, name: str) -> int:
    """Bytes of a tensor as stored."""
    count = reader.dtype(name).itemsize
    for size in reader.shape(name):
        count *= size
    return count
