"""Cross entropy behind a vocabulary-parallel linear layer, some rows at a time: logits never exist as a whole.

The backward pass computes each chunk's logits again, a third more work for the head, in place of keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def chunked_loss(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    first_id: int,
    real: int,
    group: ProcessGroup,
    chunk_rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Losses [k], fp32, the same on every rank of ``group``.

    rows [k, h]; weight [v, h] and bias [v], this rank's shard of the vocabulary, whose ids begin at ``first_id`` and
    whose rows from ``real`` on are padding with probability 0; targets int64 [k]. The gradient of ``rows`` is this
    shard's part of it: the caller sums over ``group``.
    """
    return _ChunkedLoss.apply(rows, weight, bias, targets, first_id, real, group, chunk_rows)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, targets, first_id, real, group, chunk_rows):
        losses, normalisers = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
        for part in _chunks(len(rows), chunk_rows):
            logits = _logits(rows[part], weight, bias, real)
            column, here = _columns(targets[part], first_id, logits.shape[1])
            largest = logits.amax(dim=1)
            _reduce(largest, ReduceOp.MAX, group)
            predicted = logits.gather(1, column[:, None]).squeeze(1).masked_fill(~here, 0.0)
            sums = torch.stack([logits.sub_(largest[:, None]).exp_().sum(dim=1), predicted])
            _reduce(sums, ReduceOp.SUM, group)
            normalisers[part] = largest + sums[0].log()
            losses[part] = normalisers[part] - sums[1]
        ctx.save_for_backward(rows, weight, bias, targets, normalisers)
        ctx.settings = (first_id, real, chunk_rows)
        return losses

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, bias, targets, normalisers = ctx.saved_tensors
        first_id, real, chunk_rows = ctx.settings
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_rows = torch.empty_like(rows) if wants_rows else None
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for part in _chunks(len(rows), chunk_rows):
            error = _logits(rows[part], weight, bias, real).sub_(normalisers[part][:, None]).exp_()
            column, here = _columns(targets[part], first_id, error.shape[1])
            error.scatter_add_(1, column[:, None], -here[:, None].float())
            error = error.mul_(gradient[part][:, None])
            if wants_bias:
                to_bias += error.sum(dim=0)
            error = error.to(rows.dtype)
            if wants_rows:
                torch.mm(error, weight, out=to_rows[part])
            if wants_weight:
                to_weight.addmm_(error.t(), rows[part])
        return to_rows, to_weight, to_bias.to(bias.dtype) if wants_bias else None, *[None] * 5


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, real: int) -> Tensor:
    """fp32 [k, v]; columns from ``real`` on have the least value there is."""
    logits = torch.nn.functional.linear(rows, weight, bias).float()
    logits[:, real:] = torch.finfo(torch.float32).min
    return logits


def _columns(targets: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """(column of each target, whether it is of this shard)."""
    local = targets - first_id
    here = (local >= 0) & (local < width)
    return local.masked_fill(~here, 0), here


def _reduce(tensor: Tensor, operation, group: ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, op=operation, group=group)
