"""Rotary positions of a packed row in one go.

megatron-core rotates the samples of a row one after another and copies each into its place. The backward pass of such
a copy reads and writes the whole row, so that a row of many short samples spends more time there than in attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rotating_whole_rows(original: Callable) -> Callable:
    """``rope_utils._apply_rotary_pos_emb_thd`` that looks up every position's frequencies and rotates once.

    Under context parallelism a rank's pieces of a row begin anywhere in a sample, which ``cu_seqlens`` does not say:
    ``freqs`` [t, 1, 1, d] must be those of its own positions. Without it, frequencies of all positions of the row are
    left to ``original``.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    def rotate(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_group=None, **settings) -> Tensor:
        total = t.size(0)
        if cp_group is not None and cp_group.size() > 1:
            assert freqs.size(0) == total, f"frequencies of {freqs.size(0)} positions for {total}"
            return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **settings).squeeze(1)
        if cp_group is None or freqs.size(0) == total:
            return original(t, cu_seqlens, freqs, cp_group=cp_group, **settings)
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
        places = torch.arange(total, device=t.device) - starts.to(t.device)
        return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs.index_select(0, places), **settings).squeeze(1)

    return rotate
