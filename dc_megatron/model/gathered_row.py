"""A context-parallel group's pieces of a row, on every rank as the whole row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_row(mine: Tensor, group: ProcessGroup) -> Tensor:
    """[t, ...] of a rank's two pieces (see ``row_pieces``) -> [t * size, ...], all positions of the row in order.

    Every rank works on the whole with queries of its own, so the gradient of a rank's pieces is the sum of what all
    ranks found for them.
    """
    return _GatherRow.apply(mine, group)


class _GatherRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine, group):
        ctx.group = group
        gathered = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, mine.contiguous(), group=group)
        return in_row_order(gathered, group.size())

    @staticmethod
    def backward(ctx, gradient):
        size = ctx.group.size()
        mine = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, in_rank_order(gradient, size), group=ctx.group)
        return mine, None


def in_row_order(gathered: Tensor, size: int) -> Tensor:
    """[T, ...], the two pieces of rank 0, of rank 1, ... -> the pieces as they stand in the row."""
    early, late = gathered.unflatten(0, (size, 2, -1)).unbind(1)
    return torch.cat([early.flatten(0, 1), late.flip(0).flatten(0, 1)])


def in_rank_order(row: Tensor, size: int) -> Tensor:
    """The way back."""
    early, late = row.unflatten(0, (2, size, -1))
    return torch.stack([early, late.flip(0)], dim=1).flatten(0, 2)
