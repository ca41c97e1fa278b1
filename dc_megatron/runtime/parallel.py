"""Process groups of megatron.core for programs that run without megatron.training: scoring, generation, tests."""

from __future__ import annotations

import datetime
import os

import torch

from dc_megatron.runtime import device


def start(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 10,
) -> None:
    """Join torch.distributed (torchrun's environment, or a world of one) and make megatron.core's groups.

    Calling again with other sizes tears the groups down and makes new ones, so that one set of worker processes can
    serve many layouts. The patches must have been applied.
    """
    # Tensor parallelism wants kernels in order of launch, and megatron-core warns where nothing says so.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device.has_cuda():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        store = None if "MASTER_ADDR" in os.environ else torch.distributed.HashStore()
        torch.distributed.init_process_group(
            device.distributed_backend(),
            rank=rank,
            world_size=world,
            store=store,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def stop() -> None:
    """Leave the groups and torch.distributed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
