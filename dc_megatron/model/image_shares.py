"""The features of a micro-batch's images, of which every rank of a group has encoded a share, on all ranks."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup


def image_group(groups: ProcessGroupCollection) -> ProcessGroup:
    """The ranks that share a micro-batch's images: all that get the same rows on one pipeline stage."""
    return groups.tp if groups.cp.size() == 1 else groups.tp_cp


def gather_shares(share: Tensor, groups: ProcessGroupCollection) -> Tensor:
    """[k, ...] on each rank of ``image_group``, the same k -> [k * size, ...] in rank order on all of them.

    For what is computed with all features alike on every rank, as the connector is: the gradient of the whole is then
    known on every tensor-parallel rank, and a rank's own rows of it are the gradient of its share. They come back times
    the number of tensor-parallel ranks, because a tower's gradients, each rank's of its own images, are *averaged* over
    these in the end (see ``VisionTower.set_learning``), and are parts of a sum. A context-parallel rank has found what
    its pieces of the row add to the gradient, so that is added up first.
    """
    group = image_group(groups)
    return _GatherShares.apply(share, group, groups) if group.size() > 1 else share


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share, group, groups):
        ctx.group, ctx.groups = group, groups
        gathered = share.new_empty(len(share) * group.size(), *share.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, share.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        rank, size = ctx.group.rank(), ctx.group.size()
        if ctx.groups.cp.size() > 1:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient, group=ctx.groups.cp)
        return gradient.chunk(size)[rank] * ctx.groups.tp.size(), None, None
