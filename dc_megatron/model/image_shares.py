"""The features of a micro-batch's images, of which every tensor-parallel rank has encoded a share, on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_shares(share: Tensor, group: ProcessGroup) -> Tensor:
    """[k, ...] on each rank of ``group``, the same k -> [k * size, ...] in rank order on all of them.

    For what is computed with all features alike on every rank, as the connector is: the gradient of the whole is then
    known on every rank, and a rank's own rows of it are the gradient of its share. They come back times the size of the
    group, because a tower's gradients, each rank's of its own images, are *averaged* over the group in the end (see
    ``VisionTower.set_learning``), and are parts of a sum.
    """
    return _GatherShares.apply(share, group) if group.size() > 1 else share


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, group):
        ctx.group = group
        gathered = share.new_empty(len(share) * group.size(), *share.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, share.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        rank, size = ctx.group.rank(), ctx.group.size()
        return gradient.chunk(size)[rank] * size, None
