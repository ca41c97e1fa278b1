"""The two sides of the weights table as readers: Megatron's full tensors out of Hugging Face's, and the reverse.

Both rest on ``rules.pieces`` at tensor-parallel size 1, where a shard is the full tensor: what lies where in it is
written down once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.weights.rules import Piece, Rule, pieces, shard_shape
from dc_megatron.weights.tensor_reader import TensorReader
from dc_megatron.weights.torch_dist_tree import TorchDistTree


class Tree(Protocol):
    """Megatron's tensors by key; keys with ``{layer}`` want a layer, and their shapes are those of one layer."""

    def has(self, key: str) -> bool: ...

    def shape(self, key: str, layer: int | None) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def position(self, key: str, layer: int | None) -> tuple: ...

    def read_rows(self, key: str, layer: int | None, start: int, end: int, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Strip:
    """Rows [start, end) of a Hugging Face tensor and the row of the full Megatron tensor where they begin."""

    name: str
    start: int
    end: int
    full_start: int


def strips(rule: Rule, layer: int | None) -> list[Strip]:
    """The full Megatron tensor from its first row to its last; padding rows of a vocabulary are in no strip."""
    found, row = [], 0
    for piece in pieces(rule, layer, 0, 1):
        found.append(_strip(rule, piece, row))
        row += piece.height
    return found


def _strip(rule: Rule, piece: Piece, row: int) -> Strip:
    whole = piece.columns is None or piece.columns == (0, rule.sources[0].shape[1])
    assert whole, f"{rule.key}: a full tensor holds whole rows, not columns {piece.columns}"
    return Strip(piece.name, *piece.rows, row)


class AsMegatron:
    """Rows of full Megatron tensors, read from Hugging Face tensors."""

    def __init__(self, reader: TensorReader):
        self._reader = reader

    def shape(self, rule: Rule) -> tuple[int, ...]:
        return shard_shape(rule, 1)

    def dtype(self, rule: Rule, layer: int | None) -> torch.dtype:
        """UserError where the tensors that are fused here are of different dtypes."""
        kinds = {name: self._reader.dtype(name) for name in rule.source_shapes(layer)}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in kinds.items())
            raise UserError(f"{listed}: they become one tensor and must have one dtype; convert the folder first")
        return next(iter(kinds.values()))

    def position(self, rule: Rule, layer: int | None) -> tuple:
        return self._reader.position(next(iter(rule.source_shapes(layer))))

    def read_rows(self, rule: Rule, layer: int | None, start: int, end: int, out: Tensor) -> None:
        """Fill ``out`` [end - start, ...] with rows of the full tensor; rows of no strip are zero."""
        filled = start
        for strip in strips(rule, layer):
            first = max(start, strip.full_start)
            last = min(end, strip.full_start + strip.end - strip.start)
            if first < last:
                shift = strip.start - strip.full_start
                self._reader.read_rows(strip.name, first + shift, last + shift, out[first - start : last - start])
                filled = last
        out[filled - start :].zero_()


class AsHuggingFace:
    """A ``TensorReader`` of Hugging Face names over Megatron's tree.

    ``prefix`` goes in front of the table's keys. UserError where the tree lacks a tensor or has it in another shape.
    """

    def __init__(self, tree: Tree, table: Sequence[Rule], num_layers: int, prefix: str, what: str):
        self._tree = tree
        self._places: dict[str, tuple[Rule, str, int | None]] = {}
        self._strips: dict[str, list[Strip]] = {}
        keys = {rule: self._key(rule, prefix, what) for rule in table}
        for rule, layer in _in_order(table, num_layers):
            self._check_shape(rule, keys[rule], layer, what)
            for strip in strips(rule, layer):
                self._places[strip.name] = (rule, keys[rule], layer)
                self._strips.setdefault(strip.name, []).append(strip)
        self._shapes = {}
        for name, (rule, _, layer) in self._places.items():
            self._shapes[name] = rule.source_shapes(layer)[name]

    def _key(self, rule: Rule, prefix: str, what: str) -> str:
        for key in (rule.key, *rule.other_keys):
            if self._tree.has(prefix + key):
                return prefix + key
        raise UserError(f"{what}: holds no {prefix}{rule.key}: not a tree of this model, or incomplete")

    def _check_shape(self, rule: Rule, key: str, layer: int | None, what: str) -> None:
        found, expected = self._tree.shape(key, layer), shard_shape(rule, 1)
        # The tree is padded for the tensor-parallel size that it was trained at.
        enough = rule.kind == "vocab" and found[1:] == expected[1:] and found[0] >= rule.sources[0].shape[0]
        if found != expected and not enough:
            raise UserError(
                f"{what}: {key} has shape {list(found)}, but hf/config.json asks for {list(expected)}: configuration"
                " and weights are of different models"
            )

    def names(self) -> list[str]:
        return list(self._places)

    def keys(self) -> set[str]:
        """Keys of the tree that are read."""
        return {key for _, key, _ in self._places.values()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tree.dtype(self._places[name][1])

    def position(self, name: str) -> tuple:
        _, key, layer = self._places[name]
        return (*self._tree.position(key, layer), self._strips[name][0].full_start)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        _, key, layer = self._places[name]
        for strip in self._strips[name]:
            first, last = max(start, strip.start), min(end, strip.end)
            if first < last:
                shift = strip.full_start - strip.start
                self._tree.read_rows(key, layer, first + shift, last + shift, out[first - start : last - start])


def _in_order(table: Sequence[Rule], num_layers: int) -> list[tuple[Rule, int | None]]:
    """Rows of the table with their layers as a forward pass meets them: all of a layer before the next one."""
    layered = [rule for rule in table if rule.layered]
    order: list[tuple[Rule, int | None]] = []
    for rule in table:
        if not rule.layered:
            order.append((rule, None))
        elif rule is layered[0]:
            order += [(row, layer) for layer in range(num_layers) for row in layered]
    return order


class PlainTensors:
    """The tree's tensors that no layer is stacked in, under their own keys."""

    def __init__(self, tree: TorchDistTree):
        self._tree = tree

    def names(self) -> list[str]:
        return list(self._tree.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tree.shape(name, None)

    def dtype(self, name: str) -> torch.dtype:
        return self._tree.dtype(name)

    def position(self, name: str) -> tuple:
        return self._tree.position(name, None)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        self._tree.read_rows(name, None, start, end, out)
