"""The ranks of Megatron-FSDP's device mesh, without the package that megatron-core reshapes a list of them with."""

from __future__ import annotations

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
