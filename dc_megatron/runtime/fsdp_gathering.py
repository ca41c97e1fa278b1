"""What Megatron-FSDP needs where a package or CUDA is missing: the ranks of its device mesh, and gathering in line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup


def data_by_tensor_ranks(data_group: ProcessGroup, tensor_group: ProcessGroup, ep_size: int = 1) -> torch.Tensor:
    """Global ranks [data-parallel, tensor-parallel], which are all of them: there are no experts and no stages."""
    data, tensor = data_group.size(), tensor_group.size()
    assert ep_size == 1, "there are no experts"
    assert data * tensor == torch.distributed.get_world_size(), "there are ranks outside the mesh"
    mesh = torch.arange(data * tensor).view(data, tensor)
    rank = torch.distributed.get_rank()
    assert mesh[:, rank % tensor].tolist() == torch.distributed.get_process_group_ranks(data_group)
    assert mesh[rank // tensor].tolist() == torch.distributed.get_process_group_ranks(tensor_group)
    return mesh


def gathered_at_once(original: Callable) -> Callable:
    """``all_gather_params`` that comes back when the weights are there."""

    @functools.wraps(original)
    def all_gather_params(self, *args, **kwargs):
        return original(self, *args, **{**kwargs, "async_param_gather": False})

    return all_gather_params
