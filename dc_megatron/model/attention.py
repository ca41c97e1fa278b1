"""Core attention on torch's scaled_dot_product_attention, for machines without Transformer Engine.

megatron-core's own local attention refuses packed sequences; this one takes both forms.
"""

from __future__ import annotations

import itertools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention behind megatron-core's core-attention interface.

    Unpacked: query [s, b, heads, d], key and value [s, b, groups, d] of one length -> [s, b, heads * d]. Packed (qkv
    format thd): [t, heads, d] and [t, groups, d] -> [t, heads * d], where each stretch of ``cu_seqlens_q`` attends
    only to itself; ``cu_seqlens_q[-1]`` must equal t, padding being a stretch of its own.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "torch attention has no context parallelism"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert attention_mask is None, "the causal mask is implied; a mask tensor was given"
        assert attention_bias is None, "attention bias is not supported"
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(query, *_repeated(query, key, value, 1))
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        assert bounds[-1] == query.shape[0], f"cu_seqlens ends at {bounds[-1]}, the row has {query.shape[0]} tokens"
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        # Split once: the backward pass of a slice fills a tensor as long as the row, for every sample of it.
        whole = (query, *_repeated(query, key, value, 1))
        stretches = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in whole), strict=True)
        attended = [self._attend(*(x.unsqueeze(0) for x in stretch)).squeeze(0) for stretch in stretches]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, d] each."""
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )


def _repeated(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Key and value with a head for each of the query's, along dimension ``heads``: CPU kernels know no groups."""
    repeats = query.shape[heads] // key.shape[heads]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=heads), value.repeat_interleave(repeats, dim=heads)
