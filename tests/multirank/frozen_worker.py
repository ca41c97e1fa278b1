"""What a rank does for the tests of frozen weights: a step, and what was kept and made for it."""

from __future__ import annotations

import torch

from dc_megatron.runtime import parallel
from dc_megatron.training.forward_step import with_places
from tests.multirank.job import Job
from tests.multirank.parity_worker import build


class _Saved:
    """Storages that autograd keeps for the backward pass, by where they lie; parameters are not counted."""

    def __init__(self, model: torch.nn.Module):
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def _linears(model) -> dict[str, torch.nn.Module]:
    """Linear layers of the decoder: queries, keys and values, projection, and the two of the MLP."""
    return {
        name: layer
        for name, layer in model.language_model.decoder.named_modules()
        if "ParallelLinear" in str(type(layer))
    }


def step(job: Job) -> dict:
    """A forward and a backward pass over the first micro-batch; see the keys."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel.start()
    config, (model,) = build(job)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    chunk = DistributedDataParallel(config, settings, model)
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in _linears(model).items():
        # Kept here, so that no later tensor can lie in the same place.
        layer.register_forward_pre_hook(lambda layer, given, name=name: inputs.update({name: given[0]}))
    saved = _Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        losses = chunk(with_places(job.micro_batches[0][0]))
    losses.sum().backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
    places = {name: tensor.untyped_storage() for name, tensor in inputs.items()}
    return {
        "linears": sorted(inputs),
        "saved_inputs": sorted(name for name, place in places.items() if place.data_ptr() in saved.sizes),
        "input_bytes": sum({place.data_ptr(): place.nbytes() for place in places.values()}.values()),
        "saved_bytes": sum(saved.sizes.values()),
        "with_grad": sorted(n for n, p in model.named_parameters() if p.grad is not None),
        "with_main_grad": sorted(n for n, p in model.named_parameters() if getattr(p, "main_grad", None) is not None),
        "learnt": sorted(n for n, p in model.named_parameters() if hasattr(p, "main_grad") and p.main_grad.any()),
        "buffered": sorted(names[id(parameter)] for buffer in buffers for parameter in buffer.params),
        "buffer_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "connector_values": sum(p.numel() for p in model.connector.parameters()),
        "trained_values": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "layers": config.num_layers,
    }
