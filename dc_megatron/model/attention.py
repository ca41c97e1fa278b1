"""Core attention on torch's or flash-attn's kernels, for machines without Transformer Engine.

megatron-core's own local attention refuses packed sequences; this one takes both forms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dc_megatron.runtime import installed


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention behind megatron-core's core-attention interface.

    Unpacked: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]; a query of one position
    attends to keys of any number, which are those up to it (a cache of keys and values). Packed (qkv
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
        kernel = KERNELS[packed_kernel(query.device.type, query.dtype, query.shape[-1])]
        dropout = self.dropout if self.training else 0.0
        bounds, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        return kernel(query, key, value, bounds, longest, self.softmax_scale, dropout).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, d] each; key and value may be longer than a query of one position."""
        assert query.shape[2] in (1, key.shape[2]), f"{query.shape[2]} positions of {key.shape[2]}"
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=query.shape[2] > 1,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )


# The kernels of packed rows: (query [t, heads, d], key and value [t, groups, d], int32 bounds, longest stretch, scale,
# dropout) -> [t, heads, d].


def _flash_attention(query, key, value, bounds, longest, scale, dropout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=True
    )


def _torch_varlen(query, key, value, bounds, longest, scale, dropout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0.0, "torch's varlen attention has no dropout"
    key, value = _repeated(query, key, value, 1)
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))


def _each_alone(query, key, value, bounds, longest, scale, dropout) -> Tensor:
    """scaled_dot_product_attention of one stretch after another."""
    places = bounds.tolist()
    assert places[-1] == query.shape[0], f"cu_seqlens ends at {places[-1]}, the row has {query.shape[0]} tokens"
    lengths = [end - start for start, end in itertools.pairwise(places) if end > start]
    # Split once: the backward pass of a slice fills a tensor as long as the row, for every sample of it.
    whole = (query, *_repeated(query, key, value, 1))
    stretches = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in whole), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.unsqueeze(0) for x in stretch), is_causal=True, dropout_p=dropout, scale=scale
        ).squeeze(0)
        for stretch in stretches
    ]
    return torch.cat(attended, dim=1).transpose(0, 1)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": _flash_attention,
    "torch_varlen": _torch_varlen,
    "sdpa": _each_alone,
}


@cache
def packed_kernel(device: str, dtype: torch.dtype, head_size: int) -> str:
    """Name in KERNELS of the fastest kernel that takes tensors of this kind here.

    flash-attn and torch's copy of it want a GPU of compute capability 8.0, 16 bits and up to 256 values a head.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device != "cuda" or not half or head_size > 256 or torch.cuda.get_device_capability() < (8, 0):
        return "sdpa"
    if installed.usable_flash_attention():
        return "flash_attn"
    return "torch_varlen" if _has_torch_varlen() else "sdpa"


def _has_torch_varlen() -> bool:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


def _repeated(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Key and value with a head for each of the query's, along dimension ``heads``: CPU kernels know no groups."""
    repeats = query.shape[heads] // key.shape[heads]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=heads), value.repeat_interleave(repeats, dim=heads)
