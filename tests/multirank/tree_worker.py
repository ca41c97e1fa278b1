"""What ranks do for the tests of the weights table against real models: build them, and say what they hold and save."""

from __future__ import annotations

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, padded_vocab_size
from dc_megatron.inference.assemble import build_model, global_name
from dc_megatron.model.language_model import Layout, transformer_config
from dc_megatron.runtime import parallel


def build_chunks(language: LanguageConfig, vision_folder: str, layout: Layout) -> list:
    """This rank's model chunks with random weights, the groups of ``layout`` having been made."""
    from megatron.core import parallel_state as mpu

    vision, connector = VisionConfig.from_folder(vision_folder), ConnectorConfig("dci")
    virtual = layout.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            build_model(
                language,
                vision,
                connector,
                transformer_config(language, layout),
                vocab_rows=padded_vocab_size(language.vocab_size, layout.tensor_model_parallel_size),
                max_sequence_length=128,
                transformer_engine=False,
                seed=1,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    return chunks


def start(layout: Layout) -> None:
    parallel.start(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
    )


def describe(folders: list[str], vision_folder: str, layout: Layout) -> list[dict]:
    """For every model: parameters of this rank (global name -> shape) and entries that it saves (key -> shape)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    start(layout)
    described = []
    for folder in folders:
        chunks = build_chunks(LanguageConfig.from_folder(folder), vision_folder, layout)
        states = [chunk.sharded_state_dict() for chunk in chunks]
        for state in states:
            apply_factories(state)  # splits fc1 into gate and up
        saved = [value for state in states for value in nested_values(state)]
        tensors = [value for value in saved if isinstance(value, ShardedTensor)]
        objects = [value for value in saved if isinstance(value, ShardedObject)]
        described.append(
            {
                "parameters": {
                    global_name(chunk, name): tuple(parameter.shape)
                    for chunk in chunks
                    for name, parameter in chunk.language_model.named_parameters()
                },
                "tensors": {value.key: tuple(value.global_shape) for value in tensors},
                "any number of rows": {value.key for value in tensors if value.allow_shape_mismatch},
                "objects": {value.unique_key: value.data for value in objects},
                "others": len(saved) - len(tensors) - len(objects),
            }
        )
    return described
