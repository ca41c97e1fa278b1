"""Core attention on torch's or flash-attn's kernels: without Transformer Engine, and under context parallelism.

megatron-core's own local attention refuses packed sequences; this one takes both forms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dc_megatron.model.gathered_row import gather_row
from dc_megatron.model.row_pieces import Bounds, Piece
from dc_megatron.runtime import installed


class TorchCoreAttention(MegatronModule):
    """Causal softmax attention behind megatron-core's core-attention interface.

    Unpacked: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]; a query of one position
    attends to keys of any number, which are those up to it (a cache of keys and values). Packed (qkv
    format thd): [t, heads, d] and [t, groups, d] -> [t, heads * d], where each stretch of ``cu_seqlens_q`` attends
    only to itself; ``cu_seqlens_q[-1]`` must equal t, padding being a stretch of its own.

    Under context parallelism rows are packed, t is a rank's two pieces of one, and ``packed_seq_params.pieces`` (see
    ``row_pieces``) says what they attend to. Keys and values of the whole row are gathered for that.
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
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
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
            assert self.context_group is None, "context parallelism divides packed rows only"
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(query, *_repeated(query, key, value, 1))
            return out.permute(2, 0, 1, 3).flatten(2)
        if self.context_group is None:
            bounds = Bounds.of_samples(packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q)
            return self._attend_packed(query, key, value, bounds).flatten(1)
        return self._attend_from_pieces(query, key, value, packed_seq_params.pieces.pieces).flatten(1)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> Tensor:
        kernel = KERNELS[packed_kernel(query.device.type, query.dtype, query.shape[-1])]
        return kernel(query, key, value, bounds, self.softmax_scale, self.dropout if self.training else 0.0)

    def _attend_from_pieces(self, query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece]) -> Tensor:
        # One collective for both: they have the same shape.
        key, value = gather_row(torch.cat([key, value], dim=1), self.context_group).chunk(2, dim=1)
        attended = []
        for piece, own in zip(pieces, query.split([piece.end - piece.start for piece in pieces]), strict=True):
            seen = slice(piece.first_key, piece.end)
            attended.append(self._attend_packed(own, key[seen], value[seen], piece.bounds))
        return torch.cat(attended)

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


# The kernels of packed rows: (query [t, heads, d], key and value [k, groups, d], their bounds, scale, dropout)
# -> [t, heads, d]. A causal mask of fewer queries than keys is aligned at the last of both.


def _flash_attention(query, key, value, bounds, scale, dropout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, *_in_words(bounds), dropout_p=dropout, softmax_scale=scale, causal=True
    )


def _torch_varlen(query, key, value, bounds, scale, dropout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0.0, "torch's varlen attention has no dropout"
    key, value = _repeated(query, key, value, 1)
    return varlen_attn(query, key, value, *_in_words(bounds), scale=scale, window_size=(-1, 0))


def _in_words(bounds: Bounds) -> tuple:
    """As flash-attn's and torch's functions take them."""
    return bounds.queries, bounds.keys, bounds.longest_query, bounds.longest_key


def _each_alone(query, key, value, bounds, scale, dropout) -> Tensor:
    """scaled_dot_product_attention of one stretch after another."""
    queries, keys = _lengths(bounds.queries, query), _lengths(bounds.keys, key)
    # Split once: the backward pass of a slice fills a tensor as long as the row, for every sample of it.
    whole = (query, *_repeated(query, key, value, 1))
    lengths = (queries, keys, keys)
    parts = (x.transpose(0, 1).split(each, dim=1) for x, each in zip(whole, lengths, strict=True))
    attended = [_causal(*stretch, dropout, scale) for stretch in zip(*parts, strict=True)]
    return torch.cat(attended, dim=1).transpose(0, 1)


def _lengths(bounds: Tensor, row: Tensor) -> list[int]:
    """Positions of the stretches that have any."""
    places = bounds.tolist()
    assert places[-1] == row.shape[0], f"cu_seqlens ends at {places[-1]}, the row has {row.shape[0]} tokens"
    return [end - start for start, end in itertools.pairwise(places) if end > start]


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float) -> Tensor:
    """[heads, q, d] with keys and values [heads, k, d], of which the first k - q stand before all queries."""
    queries, keys = query.shape[1], key.shape[1]
    mask = None
    if queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.unsqueeze(0) for x in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
    ).squeeze(0)


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
