"""One row of a weights table: how one Megatron parameter is made of Hugging Face tensors, in both directions.

A row says what a tensor-parallel shard is made of: pieces of Hugging Face tensors, one under the other, each a range
of rows and perhaps of columns. Reading a shard copies the pieces in, exporting copies the same pieces out: the inverse
is derived and written nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What a shard of each kind holds ("source" is a Hugging Face tensor; tp the tensor-parallel size):
# copy     the whole source, on every rank
# columns  one tp-th of the source's columns: the input side of a row-parallel linear
# vocab    one tp-th of the source's rows after padding with zero rows
# qkv      one tp-th of the KV groups, each [query heads of the group; key; value]
# rows     one tp-th of each source's rows: of one source the output side of a column-parallel linear; of two [gate; up]
#          of this rank, not a part of their concatenation
KINDS = ("copy", "columns", "vocab", "qkv", "rows")

Range = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name, with ``{layer}`` where there is one a layer, and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows (and columns, None for all) of a Hugging Face tensor, end excluded, that lie together in a shard."""

    name: str
    rows: Range
    columns: Range | None = None

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True)
class Rule:
    """``key``: the Megatron parameter, with ``{layer}`` (counted over the whole model) where there is one a layer.

    ``other_keys``: further spellings of the same parameter. ``groups``: key-value groups of kind ``qkv``.
    ``padded_rows``: rows of kind ``vocab`` after padding.
    """

    key: str
    kind: str
    sources: tuple[Source, ...]
    other_keys: tuple[str, ...] = ()
    groups: int = 0
    padded_rows: int = 0

    def __post_init__(self):
        assert self.kind in KINDS, f"{self.key}: unknown kind '{self.kind}'"

    @property
    def layered(self) -> bool:
        return "{layer}" in self.key

    def source_shapes(self, layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the Hugging Face tensors behind this row, at one layer where it is layered."""
        return {source.name.format(layer=layer): source.shape for source in self.sources}


def shard_shape(rule: Rule, tp_size: int) -> tuple[int, ...]:
    """Shape of the parameter on each of ``tp_size`` ranks; ``tp_size`` 1 gives the full tensor."""
    if rule.kind == "copy":
        return rule.sources[0].shape
    if rule.kind == "columns":
        rows, columns = rule.sources[0].shape
        return rows, _divided(rule, columns, tp_size)
    rows = rule.padded_rows if rule.kind == "vocab" else sum(source.shape[0] for source in rule.sources)
    return _divided(rule, rows, tp_size), *rule.sources[0].shape[1:]


def pieces(rule: Rule, layer: int | None, tp_rank: int, tp_size: int) -> list[Piece]:
    """What the shard of ``tp_rank`` is made of, from its first row on; rows that remain below are zero."""
    first = rule.sources[0]
    name = first.name.format(layer=layer)
    if rule.kind == "copy":
        return [Piece(name, (0, first.shape[0]))]
    if rule.kind == "columns":
        width = _divided(rule, first.shape[1], tp_size)
        return [Piece(name, (0, first.shape[0]), (tp_rank * width, (tp_rank + 1) * width))]
    if rule.kind == "vocab":
        height = _divided(rule, rule.padded_rows, tp_size)
        start, end = tp_rank * height, min((tp_rank + 1) * height, first.shape[0])
        return [Piece(name, (start, end))] if start < end else []
    # qkv interleaves its sources group by group, rows rank by rank: the same weave with another number of blocks.
    blocks = rule.groups if rule.kind == "qkv" else tp_size
    per_rank = _divided(rule, blocks, tp_size)
    woven = []
    for block in range(tp_rank * per_rank, (tp_rank + 1) * per_rank):
        for source in rule.sources:
            height = _divided(rule, source.shape[0], blocks)
            woven.append(Piece(source.name.format(layer=layer), (block * height, (block + 1) * height)))
    return woven


def read_shard(
    rule: Rule,
    layer: int | None,
    tp_rank: int,
    tp_size: int,
    read: Callable[[str, Range | None, Range | None], Tensor],
) -> Tensor:
    """Hugging Face -> Megatron: the shard of ``tp_rank``, in the sources' dtype.

    ``read(name, rows, columns)`` returns that part of a Hugging Face tensor in memory of its own, contiguous; only what
    the shard holds is asked for.
    """
    parts = [read(piece.name, piece.rows, piece.columns) for piece in pieces(rule, layer, tp_rank, tp_size)]
    shape = shard_shape(rule, tp_size)
    missing = shape[0] - sum(part.shape[0] for part in parts)
    if missing:
        dtype = parts[0].dtype if parts else read(rule.sources[0].name.format(layer=layer), (0, 1), None).dtype
        parts.append(torch.zeros(missing, *shape[1:], dtype=dtype))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_hugging_face(rule: Rule, layer: int | None, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Megatron -> Hugging Face: the sources from the shards of all tensor-parallel ranks, in rank order.

    A full tensor is the one shard of TP 1. Padding rows are left out.
    """
    tensors = {name: shards[0].new_empty(shape) for name, shape in rule.source_shapes(layer).items()}
    for tp_rank, shard in enumerate(shards):
        expected = shard_shape(rule, len(shards))
        assert tuple(shard.shape) == expected, f"{rule.key}: shard is {tuple(shard.shape)}, not {expected}"
        start = 0
        for piece in pieces(rule, layer, tp_rank, len(shards)):
            target = tensors[piece.name][slice(*piece.rows)]
            if piece.columns is not None:
                target = target[:, slice(*piece.columns)]
            target.copy_(shard[start : start + piece.height])
            start += piece.height
    return tensors


def _divided(rule: Rule, size: int, parts: int) -> int:
    assert size % parts == 0, f"{rule.key}: {size} does not divide by {parts}"
    return size // parts
