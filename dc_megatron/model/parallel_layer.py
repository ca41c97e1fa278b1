"""Phi's decoder layer: attention and MLP read one norm side by side, and both are added to the hidden state."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from dc_megatron.model.last_layer import LastLayer


class ParallelLayer(TransformerLayer):
    """hidden + attention(norm(hidden)) + mlp(norm(hidden)); ``pre_mlp_layernorm`` must be an identity.

    [s, b, h] in and out. The engine's own steps are kept: only what the MLP reads is another tensor.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert not self.recompute_input_layernorm, "the norm's output is read twice; it cannot be recomputed alone"
        self._normed: Tensor | None = None
        self.input_layernorm.register_forward_hook(self._keep)
        if self.recompute_mlp:
            self.mlp.register_forward_hook(_with_a_copied_bias)

    def _keep(self, _norm, _given: tuple, normed: Tensor) -> None:
        self._normed = self._mlp_input(normed)

    def _mlp_input(self, normed: Tensor) -> Tensor:
        return normed

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        normed, self._normed = self._normed, None
        return super()._forward_pre_mlp_layernorm(normed)


def _with_a_copied_bias(_mlp, _given: tuple, returned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The MLP's bias is added behind it. Megatron's checkpoint, which returns what the MLP does, would take the very
    parameter for its own output: it would have the checkpoint as its grad_fn, and the backward pass would never end.
    """
    output, bias = returned
    return output, bias.clone()


class LastParallelLayer(LastLayer, ParallelLayer):
    """The last of them, at the rows that are wanted: see ``LastLayer``."""

    def _mlp_input(self, normed: Tensor) -> Tensor:
        return normed if self._rows is None else self._chosen(normed, self._rows)
