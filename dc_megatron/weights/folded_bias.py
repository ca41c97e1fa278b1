"""A head's bias moved into the final LayerNorm and the head's weight, for models whose head has no bias.

Behind a LayerNorm of gain g and bias b stands y = g * z + b, where the normalised z sums to zero over its h channels.
So u . y with u = 1 / g is the same number for every position, sum(b / g), and can carry a constant. Asked for are b'
and W' with W' (g * z + b') = W y + beta for every such z: W' = W + v u^T for any v, of which the head's row k wants

    v_k = (beta_k + W_k . (b - b')) / (u . b').

b' = b would do where u . b is not near zero. b' = b + s g, with s = 1 or -1, the sign of u . b, adds h to its
magnitude, so that it never is: u . b' = u . b + s h. b' is rounded to its dtype first and v computed with what that
gave, in fp64, so that nothing but the rounding of W' is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.weights.tensor_reader import TensorReader, read_tensor

# Rows that are computed at a time: some 16 MB in fp64 for a hidden size of 8192.
_ROWS = 256


class FoldedHead:
    """A ``TensorReader`` of the head's weight W' and the final norm's bias b', under the names of W and b.

    ``names``: (W, beta, g, b) in ``reader``. ``dtype``: that of the target, None as stored. UserError where a gain is
    zero: that channel says nothing about the others.
    """

    def __init__(self, reader: TensorReader, names: Sequence[str], dtype: torch.dtype | None, what: str):
        self._reader = reader
        self._head, beta, gain, bias = names
        self._bias = bias
        self._types = {self._head: dtype or reader.dtype(self._head), bias: dtype or reader.dtype(bias)}
        g, b, self._beta = (read_tensor(reader, name).double() for name in (gain, bias, beta))
        # The target's gains are rounded too.
        g = g.to(dtype or reader.dtype(gain)).double()
        if not g.all():
            raise UserError(
                f"{what}: {int((g == 0).sum())} values of {gain} are zero, so {beta} cannot become part of it; use"
                " --format llava, which keeps the head's bias"
            )
        sign = -1.0 if (b / g).sum() < 0 else 1.0
        self._shifted = (b + sign * g).to(self._types[bias])
        self._direction = 1.0 / g
        self._moved = b - self._shifted.double()
        self._constant = self._direction @ self._shifted.double()

    def names(self) -> list[str]:
        return [self._head, self._bias]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._types[name]

    def position(self, name: str) -> tuple:
        return self._reader.position(name)

    def read_rows(self, name: str, start: int, end: int, out: Tensor) -> None:
        if name == self._bias:
            out.copy_(self._shifted[start:end])
            return
        width = self._reader.shape(name)[1]
        buffer = torch.empty(min(_ROWS, end - start), width, dtype=self._reader.dtype(name))
        for first in range(start, end, _ROWS):
            last = min(first + _ROWS, end)
            rows = buffer[: last - first]
            self._reader.read_rows(name, first, last, rows)
            weight = rows.double()
            carried = (self._beta[first:last] + weight @ self._moved) / self._constant
            out[first - start : last - start].copy_(weight + carried[:, None] * self._direction)
