"""Checkpoints of adapters on real ranks: written as the engine's save does, read at another layout."""

from __future__ import annotations

import os

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig
from dc_megatron.runtime import parallel
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import hash_file
from dc_megatron.weights.frozen_base import hash_base
from dc_megatron.weights.manifest import write_manifest
from dc_megatron.weights.projector_files import write_projector
from tests.multirank.job import Job
from tests.multirank.parity_worker import _named_tensors, build

ITERATION = 4


def save(job: Job, folder: str) -> None:
    """The model of ``job``, without an optimizer, as iteration 4 of ``folder``."""
    from megatron.core import dist_checkpointing

    parallel.start(job.tensor, job.pipeline, job.virtual)
    _, (model, *_) = build(job)
    place = checkpoint_folder.iteration_folder(folder, ITERATION)
    if torch.distributed.get_rank() == 0:
        os.makedirs(place)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, place)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _write_side_files(job, folder, model)
        write_manifest(place, {}, {name: hash_file(os.path.join(place, name)) for name in sorted(os.listdir(place))})
    torch.distributed.barrier()


def _write_side_files(job: Job, folder: str, model) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # one process hashes for all
    vision, connector = VisionConfig.from_folder(job.vision_folder), ConnectorConfig(job.connector_type)
    write_projector(folder, model.connector.state_dict(), connector, vision)
    description = checkpoint_folder.CheckpointDescription(
        vision_tower=job.vision_folder,
        vision_tower_hash=checkpoint_folder.hash_folder_weights(job.vision_folder),
        mm_dense_connector_type=job.connector_type,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        version="v1",
        image_aspect_ratio="pad",
        model_max_length=128,
        lora_r=job.lora.r,
        lora_alpha=job.lora.alpha,
        lora_dropout=job.lora.dropout,
        language_model=job.language_folder,
        language_model_files=hash_base(job.language_folder),
    )
    checkpoint_folder.write_side_files(folder, job.language_folder, description)


def load(job: Job, folder: str, peft_folder: str = "") -> dict:
    """This rank's tensors after loading iteration 4 of ``folder``, or the adapters of ``peft_folder``."""
    from dc_megatron.inference.assemble import load_adapters, load_checkpoint

    parallel.start(job.tensor, job.pipeline, job.virtual)
    _, models = build(job)
    for model in models:
        if peft_folder:
            load_adapters(model, peft_folder, LanguageConfig.from_folder(job.language_folder), job.lora)
        else:
            load_checkpoint(model, checkpoint_folder.iteration_folder(folder, ITERATION))
    from megatron.core import parallel_state

    return {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(),
        "parameters": _named_tensors(models, lambda parameter: parameter),
    }
