"""Adapters added to the weights that they stand beside, block by block: W + alpha / r * B A."""

from __future__ import annotations

import torch
from torch import Tensor

from dc_megatron.config import LoraConfig
from dc_megatron.weights.tensor_reader import TensorReader, read_tensor

# Products are taken of these rows at a time, so that a weight's bits do not depend on how it is read.
_ROWS = 256


class MergedAdapters:
    """``base`` with the factors in ``factors`` (``<module>.lora_{A,B}.weight``) added to ``<module>.weight``.

    Computed in fp64 and rounded once, to the dtype of ``base``. The factors of one linear are kept in memory.
    """

    def __init__(self, base: TensorReader, factors: TensorReader, lora: LoraConfig):
        self._base, self._factors, self._scaling = base, factors, lora.scaling
        self._adapted = {name.replace(".lora_A.", ".") for name in factors.names() if ".lora_A." in name}
        absent = self._adapted - set(base.names())
        assert not absent, f"adapters to weights that are not there: {sorted(absent)[:3]}"
        self._kept: tuple[str, Tensor, Tensor] | None = None

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def position(self, name: str) -> tuple:
        return self._base.position(name)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        self._base.read_rows(name, start, end, out)
        if name not in self._adapted:
            return
        up, down = self._pair(name)
        for first in range(start - start % _ROWS, end, _ROWS):
            update = self._scaling * (up[first : first + _ROWS] @ down)
            low, high = max(first, start), min(first + _ROWS, end)
            rows = out[low - start : high - start]
            rows.copy_(rows.double() + update[low - first : high - first])

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(B, A) of a weight in fp64."""
        if self._kept is None or self._kept[0] != name:
            module = name.removesuffix("weight")
            up, down = (read_tensor(self._factors, f"{module}lora_{factor}.weight").double() for factor in "BA")
            self._kept = (name, up, down)
        return self._kept[1:]
