"""megatron-core's GPTModel in the shape of a Hugging Face Llama-family model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from dc_megatron.config import LanguageConfig
from dc_megatron.model.attention import TorchCoreAttention
from dc_megatron.model.last_layer import LastLayer


@dataclass(frozen=True)
class Layout:
    """How a model is spread over processes, and its number format."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32
    transformer_engine: bool = False
    # Megatron's name of a scaling recipe ("delayed", "tensorwise", "blockwise"); None: no FP8.
    fp8_recipe: str | None = None


def transformer_config(language: LanguageConfig, layout: Layout) -> TransformerConfig:
    """The TransformerConfig of ``language`` for programs without megatron.training's arguments.

    Training derives the same from the engine's arguments, so that every flag of Megatron counts there; a test compares
    the two.
    """
    bf16 = layout.params_dtype == torch.bfloat16
    return TransformerConfig(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.intermediate_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=language.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=layout.transformer_engine,
        bias_dropout_fusion=layout.transformer_engine,
        masked_softmax_fusion=layout.transformer_engine,
        apply_rope_fusion=layout.transformer_engine,
        # Programs without the engine have no gradient buffers that a layer could add to.
        gradient_accumulation_fusion=False,
        persist_layer_norm=layout.transformer_engine,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=layout.params_dtype,
        pipeline_dtype=layout.params_dtype,
        deallocate_pipeline_outputs=True,
        transformer_impl="transformer_engine" if layout.transformer_engine else "local",
        bf16=bf16,
        fp16=layout.params_dtype == torch.float16,
        calculate_per_token_loss=True,
        **(_fp8_settings(layout.fp8_recipe) if layout.fp8_recipe else {}),
    )


def _fp8_settings(recipe: str) -> dict:
    """E4M3 forward, E5M2 for gradients; delayed scaling looks back as far as Transformer Engine's own default."""
    return {
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


class _TorchNorm:
    """Builder of torch norms that mark their weight for sequence parallelism, which megatron-core's own refuses."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            # Each rank sees its share of the sequence only: the engine sums these gradients over the group.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _layer_spec(config: TransformerConfig, transformer_engine: bool, layers: int, last: bool):
    """``layers`` layers; with ``last`` the uppermost of them is the model's."""
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec()
        return TransformerBlockSubmodules(layer_specs=_layers(layer, layers, last), layer_norm=TENorm)
    submodules = get_gpt_layer_local_submodules(normalization=config.normalization)
    attention = replace(submodules.self_attention.submodules, core_attention=TorchCoreAttention)
    submodules = replace(
        submodules,
        input_layernorm=_TorchNorm,
        pre_mlp_layernorm=_TorchNorm,
        self_attention=replace(submodules.self_attention, submodules=attention),
    )
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=_layers(layer, layers, last), layer_norm=_TorchNorm)


def _layers(layer: ModuleSpec, count: int, last: bool) -> list[ModuleSpec]:
    return [layer] * (count - last) + [replace(layer, module=LastLayer)] * last


def build_language_model(
    language: LanguageConfig,
    config: TransformerConfig,
    *,
    vocab_rows: int,
    max_sequence_length: int,
    transformer_engine: bool,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """This rank's part of the language model. ``vocab_rows`` is the padded vocabulary over the whole group."""
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pg_collection.pp.rank())
    return GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, transformer_engine, layers, last=post_process and layers > 0),
        vocab_size=vocab_rows,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=language.rope_theta,
        rope_scaling=language.rope_scaling_factor is not None,
        rope_scaling_factor=language.rope_scaling_factor or 1.0,
        # Image features are put in before the sequence is split over the tensor-parallel group.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
