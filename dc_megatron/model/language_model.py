"""megatron-core's GPTModel in the shape of a Hugging Face language model: Llama's family, Qwen and Phi."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from dc_megatron.config import LanguageConfig
from dc_megatron.model.attention import TorchCoreAttention
from dc_megatron.model.last_layer import LastLayer
from dc_megatron.model.loss_head import add_head_bias
from dc_megatron.model.parallel_layer import LastParallelLayer, ParallelLayer


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
    context_parallel_size: int = 1


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
        normalization="LayerNorm" if language.layer_norm else "RMSNorm",
        layernorm_epsilon=language.rms_norm_eps,
        gated_linear_unit=language.gated_mlp,
        activation_func=torch.nn.functional.silu if language.gated_mlp else torch.nn.functional.gelu,
        add_bias_linear=language.linear_bias,
        add_qkv_bias=language.qkv_bias or language.linear_bias,
        qk_layernorm=language.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=layout.transformer_engine,
        bias_dropout_fusion=layout.transformer_engine,
        masked_softmax_fusion=layout.transformer_engine,
        # The fused kernel counts positions in a way that does not fit pieces of a row.
        apply_rope_fusion=layout.transformer_engine and layout.context_parallel_size == 1,
        # Programs without the engine have no gradient buffers that a layer could add to.
        gradient_accumulation_fusion=False,
        persist_layer_norm=layout.transformer_engine,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
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


def set_activation(config: TransformerConfig) -> None:
    """GELU by its tanh approximation, which Megatron has no flag for.

    Megatron's fused kernel computes that form already where it is told gelu (fused_bias_gelu.py); unfused it takes the
    exact one.
    """
    if not config.gated_linear_unit and not config.bias_activation_fusion:
        config.activation_func = gelu_tanh


def gelu_tanh(hidden: Tensor) -> Tensor:
    """Hugging Face's gelu_new."""
    return torch.nn.functional.gelu(hidden, approximate="tanh")


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


def _block_spec(language: LanguageConfig, config: TransformerConfig, transformer_engine: bool, layers: int, last: bool):
    """``layers`` layers; with ``last`` the uppermost of them is the model's."""
    parts = _transformer_engine_parts(language, config) if transformer_engine else _torch_parts(language, config)
    plain, uppermost = (ParallelLayer, LastParallelLayer) if language.parallel_layers else (TransformerLayer, LastLayer)
    specs = [ModuleSpec(module=plain, submodules=parts)] * (layers - last)
    specs += [ModuleSpec(module=uppermost, submodules=parts)] * last
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm if transformer_engine else _TorchNorm)


def _torch_parts(language: LanguageConfig, config: TransformerConfig) -> TransformerLayerSubmodules:
    parts = get_gpt_layer_local_submodules(normalization=config.normalization, qk_layernorm=language.qk_norm)
    attention = replace(parts.self_attention.submodules, core_attention=TorchCoreAttention)
    if language.qk_norm:
        attention = replace(attention, q_layernorm=_TorchNorm, k_layernorm=_TorchNorm)
    parts = replace(
        parts,
        input_layernorm=_TorchNorm,
        pre_mlp_layernorm=_TorchNorm,
        self_attention=replace(parts.self_attention, submodules=attention),
    )
    return _behind_one_norm(parts) if language.parallel_layers else parts


def _transformer_engine_parts(language: LanguageConfig, config: TransformerConfig) -> TransformerLayerSubmodules:
    parts = get_gpt_layer_with_transformer_engine_submodules(qk_layernorm=language.qk_norm)
    if config.context_parallel_size > 1:
        # Its own context parallelism cuts every sample into equal pieces, which would have to be filled up for that.
        attention = replace(parts.self_attention.submodules, core_attention=TorchCoreAttention)
        parts = replace(parts, self_attention=replace(parts.self_attention, submodules=attention))
    if not language.parallel_layers:
        return parts
    # Transformer Engine fuses a norm with the linear behind it; here two linears are behind one norm.
    attention = replace(parts.self_attention.submodules, linear_qkv=TEColumnParallelLinear)
    linears = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return _behind_one_norm(
        replace(
            parts,
            input_layernorm=TENorm,
            self_attention=replace(parts.self_attention, submodules=attention),
            mlp=partial(MLP.as_mlp_submodule, submodules=linears),
        )
    )


def _behind_one_norm(parts: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The norm keeps its name in checkpoints: no linear owns it."""
    return replace(parts, pre_mlp_layernorm=IdentityOp, sharded_state_dict_keys_map={})


def _frequencies_of_pieces(_decoder, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    """Rotary frequencies [t, 1, 1, d] of a context-parallel rank's own positions in place of a sample's."""
    frequencies = named["rotary_pos_emb"].index_select(0, named["packed_seq_params"].pieces.places)
    return arguments, {**named, "rotary_pos_emb": frequencies}


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
    set_activation(config)
    last = post_process and layers > 0
    model = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(language, config, transformer_engine, layers, last),
        vocab_size=vocab_rows,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=language.rotary_percent,
        rotary_base=language.rope_theta,
        rope_scaling=language.rope_scaling_factor is not None,
        rope_scaling_factor=language.rope_scaling_factor or 1.0,
        # Image features are put in before the sequence is split over the tensor-parallel group.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if config.context_parallel_size > 1:
        assert not config.apply_rope_fusion, "the fused rotary kernel does not know pieces of a row"
        model.decoder.register_forward_pre_hook(_frequencies_of_pieces, with_kwargs=True)
    if language.linear_bias and post_process:
        add_head_bias(model.output_layer)
    return model
