"""The language-model head on supervised positions only, with the padded part of the vocabulary masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from dc_megatron.model.chunked_loss import chunked_loss

IGNORED = -100
# Most memory that a rank's fp32 logits may take at once; more rows than that are done in chunks.
CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class HeadRequest:
    """What ``head`` is to compute of a forward pass; the ``output_processor_context`` of GPTModel.

    labels [b, s] (already shifted, IGNORED where there is no target) asks for losses, one for each supervised
    position in row-major order of [b, s]; ``positions`` may then hold where those are, which saves looking. Without
    labels ``positions`` [k] (indices into the flattened b * s) asks for logits [k, vocab_size].
    """

    vocab_size: int
    group: torch.distributed.ProcessGroup
    labels: Tensor | None = None
    positions: Tensor | None = None
    # The hidden states are those of ``positions`` alone, with some more rows behind them.
    chosen: bool = False


def head(*, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context: HeadRequest, config, **_):
    """``output_processor`` of GPTModel.forward. hidden_states [s, b, h], or its share under sequence parallelism.

    Logits are computed for the wanted rows only. Every rank of the tensor-parallel group returns the same values.
    """
    # The layer itself is not called, so its hooks are: an overlapped parameter all-gather waits in one.
    for hook in list(output_layer._forward_pre_hooks.values()):
        hook(output_layer, ())
    weight = output_weight if output_weight is not None else output_layer.weight
    if config.sequence_parallel:
        # Its backward sums the partial gradients of the vocabulary shards, so no further reduction follows.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=context.group
        )
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=context.group)
    rows = hidden_states.transpose(0, 1).flatten(0, 1)
    labels = context.labels.flatten() if context.labels is not None else None
    positions = context.positions if context.positions is not None else (labels != IGNORED).nonzero().squeeze(-1)
    rows = rows[: positions.shape[0]] if context.chosen else rows.index_select(0, positions)
    bias = output_layer.bias
    if labels is not None:
        return _losses(rows, weight, bias, labels.index_select(0, positions), context)
    logits = _logits(rows, weight, bias, context)
    return gather_from_tensor_model_parallel_region(logits, group=context.group)[:, : context.vocab_size]


def add_head_bias(output_layer) -> None:
    """Give ``output_layer``, which GPTModel builds without one, a bias: its shard of the vocabulary's, zeros."""
    weight = output_layer.weight
    output_layer.bias = torch.nn.Parameter(weight.new_zeros(output_layer.output_size_per_partition))
    set_tensor_model_parallel_attributes(output_layer.bias, True, 0, 1)
    output_layer.bias.allreduce = True


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, context: HeadRequest) -> Tensor:
    """fp32 [k, padded vocabulary / group size]."""
    logits = torch.nn.functional.linear(rows, weight, bias).float()
    return mask_padded_columns(logits, context.vocab_size, context.group)


def _losses(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, context: HeadRequest) -> Tensor:
    shard = weight.shape[0]
    chunk_rows = max(1, CHUNK_BYTES // (4 * shard))
    if rows.shape[0] > chunk_rows:
        first = context.group.rank() * shard
        real = min(max(context.vocab_size - first, 0), shard)
        return chunked_loss(rows, weight, targets, first, real, context.group, chunk_rows, bias)
    return vocab_parallel_cross_entropy(_logits(rows, weight, bias, context), targets, tp_group=context.group)


def mask_padded_columns(logits: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """Give columns beyond the real vocabulary probability 0: their zero rows would add exp(0) each to the softmax.

    logits [k, padded vocabulary / group size], this rank's shard.
    """
    shard = logits.shape[-1]
    real = min(max(vocab_size - group.rank() * shard, 0), shard)
    if real == shard:
        return logits
    padded = torch.arange(shard, device=logits.device) >= real
    return logits.masked_fill(padded, torch.finfo(logits.dtype).min)
