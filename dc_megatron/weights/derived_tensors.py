"""Tensors that are computed from others while they are read: columns combined anew, rows of zeros below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dc_megatron.weights.tensor_reader import TensorReader

# Rows that are combined at a time: some 60 MB in fp64 for the widest projector of a 70B model.
_ROWS = 256

# (block of the source, factor) of every term of one block of the result.
Terms = Sequence[tuple[int, float]]


class ColumnBlocks:
    """One matrix whose columns, in blocks of ``width``, are sums of multiples of blocks of another's.

    ``blocks``: for each block of the result its terms; none makes it zero. A single term of factor 1 is copied as it
    is; everything else is computed in fp64 and rounded once, to ``dtype`` (None: the source's).
    """

    def __init__(
        self,
        reader: TensorReader,
        source: str,
        name: str,
        width: int,
        blocks: Sequence[Terms],
        dtype: torch.dtype | None = None,
    ):
        columns = reader.shape(source)[1]
        assert columns % width == 0, f"{source}: {columns} columns are no blocks of {width}"
        self._reader, self._source, self._name = reader, source, name
        self._width, self._blocks = width, [tuple(terms) for terms in blocks]
        self._dtype = dtype or reader.dtype(source)

    def names(self) -> list[str]:
        return [self._name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._source)[0], self._width * len(self._blocks)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def position(self, name: str) -> tuple:
        return self._reader.position(self._source)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        columns = self._reader.shape(self._source)[1]
        buffer = torch.empty(min(_ROWS, end - start), columns, dtype=self._reader.dtype(self._source))
        for first in range(start, end, _ROWS):
            last = min(first + _ROWS, end)
            rows = buffer[: last - first]
            self._reader.read_rows(self._source, first, last, rows)
            self._combine(rows, out[first - start : last - start])

    def _combine(self, rows: Tensor, out: Tensor) -> None:
        def block(matrix: Tensor, number: int) -> Tensor:
            return matrix[:, number * self._width : (number + 1) * self._width]

        for number, terms in enumerate(self._blocks):
            target = block(out, number)
            if not terms:
                target.zero_()
            elif len(terms) == 1 and terms[0][1] == 1:
                target.copy_(block(rows, terms[0][0]))
            else:
                target.copy_(sum(block(rows, source).double() * factor for source, factor in terms))


class WithZeroRows:
    """``reader`` with tensors that are longer: ``rows`` maps a name to its number of rows, zeros from its own on."""

    def __init__(self, reader: TensorReader, rows: Mapping[str, int]):
        for name, count in rows.items():
            assert count >= reader.shape(name)[0], f"{name} has {reader.shape(name)[0]} rows, more than {count}"
        self._reader, self._rows = reader, dict(rows)

    def names(self) -> list[str]:
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        rows, *rest = self._reader.shape(name)
        return self._rows.get(name, rows), *rest

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def position(self, name: str) -> tuple:
        return self._reader.position(name)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        own = min(end, self._reader.shape(name)[0])
        if start < own:
            self._reader.read_rows(name, start, own, out[: own - start])
        out[max(own - start, 0) :].zero_()


def equal_tensors(reader: TensorReader, first: str, second: str) -> bool:
    """Whether two tensors are the same, bit for bit, read in blocks."""
    if reader.shape(first) != reader.shape(second) or reader.dtype(first) != reader.dtype(second):
        return False
    rows = reader.shape(first)[0]
    for start in range(0, rows, _ROWS):
        end = min(start + _ROWS, rows)
        one, other = (torch.empty(end - start, *reader.shape(n)[1:], dtype=reader.dtype(n)) for n in (first, second))
        reader.read_rows(first, start, end, one)
        reader.read_rows(second, start, end, other)
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            return False
    return True
