"""The head as Megatron has it: logits of every position, in fp32. What the head on supervised rows is compared with."""

from __future__ import annotations

from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor

from dc_megatron.model.loss_head import IGNORED, HeadRequest, mask_padded_columns


def stock_head(*, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context: HeadRequest, config, **_):
    """In place of ``loss_head.head``: the same losses, after computing all of them."""
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    logits = mask_padded_columns(logits.transpose(0, 1).contiguous().float(), context.vocab_size, context.group)
    labels = context.labels
    losses = vocab_parallel_cross_entropy(logits, labels.clamp_min(0), tp_group=context.group)
    return losses[labels != IGNORED]
