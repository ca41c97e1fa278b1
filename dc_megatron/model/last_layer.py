"""The last decoder layer at the positions whose output is read: those with a target.

Keys and values are needed everywhere, all behind attention only there. What is left out reaches no loss, so its
gradient is zero and the result is the same.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

# FP8 products take rows in multiples of this.
_FP8_MULTIPLE = 16


class LastLayer(TransformerLayer):
    """A TransformerLayer that returns only the rows that ``packed_seq_params.wanted_rows`` (int64 [k]) names.

    [s, 1, h] in, [k, 1, h] out; under sequence parallelism a rank's equal piece of either. Without ``wanted_rows`` it
    is a layer like any other. They travel with the packed row, so that a pass that is computed again finds its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._rows: Tensor | None = None
        self.self_attention.linear_proj.register_forward_pre_hook(self._choose_attended)
        add = self.self_attn_bda
        self.self_attn_bda = lambda training, fused: self._adding_chosen(add(training, fused))

    def _forward_attention(self, hidden_states: Tensor, *args, packed_seq_params=None, **kwargs):
        self._rows = getattr(packed_seq_params, "wanted_rows", None)
        try:
            return super()._forward_attention(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            self._rows = None

    def _choose_attended(self, _linear, arguments: tuple) -> tuple | None:
        if self._rows is None:
            return None
        return (arguments[0].index_select(0, self._rows), *arguments[1:])

    def _adding_chosen(self, add):
        rows = self._rows

        def add_chosen(attended, residual: Tensor, dropout: float) -> Tensor:
            return add(attended, residual if rows is None else self._chosen(residual, rows), dropout)

        return add_chosen

    def _chosen(self, residual: Tensor, rows: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return residual.index_select(0, rows)
        group = self.pg_collection.tp
        # The gradient comes back whole on every rank (the scatter's backward gathers it), so each keeps its piece.
        whole = gather_from_sequence_parallel_region(residual, tensor_parallel_output_grad=False, group=group)
        return scatter_to_sequence_parallel_region(whole.index_select(0, rows), group=group)


def wanted_rows(places: Tensor, config) -> Tensor:
    """``places`` [k], filled up with position 0 to a number that ranks can share and FP8 can multiply, at least one."""
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    multiple *= _FP8_MULTIPLE if config.fp8 else 1
    filled = max(1, -(-places.shape[0] // multiple)) * multiple
    return torch.nn.functional.pad(places, (0, filled - places.shape[0]))


def ask_for_rows(packed: PackedSeqParams, rows: Tensor) -> PackedSeqParams:
    """``packed`` with ``wanted_rows`` for the last layer; kernels that read the other fields do not see it."""
    packed.wanted_rows = rows
    return packed
