"""The weights table of the language models (Llama, Vicuna, Yi, Mistral, Qwen2, Qwen3, Phi): one row a parameter.

Each row serves both ways. Layouts are those of megatron-core 0.19 (`GPTModel`) and of transformers 5
(`LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `PhiForCausalLM`); rotary weights
need no permutation between the two.
"""

from __future__ import annotations

import re

from dc_megatron.config import LanguageConfig
from dc_megatron.weights.rules import Rule, Source

# Buffers in folders of older transformers, computed from the configuration since.
IGNORED_NAMES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
PHI_FINAL_NORM = "model.final_layernorm"
# Everything of a language model that does not begin with "model.".
HEADS = (HEAD, HEAD_BIAS)


def language_table(language: LanguageConfig, padded_vocab_size: int) -> tuple[Rule, ...]:
    """The rows of ``language``; ``padded_vocab_size`` >= vocab_size is what the tensor-parallel size asks for.

    With tied heads ``output_layer.weight``, which exists on the last pipeline stage only, is the embedding once more.
    """
    assert padded_vocab_size >= language.vocab_size, f"padded to {padded_vocab_size}, below {language.vocab_size}"
    hidden, vocabulary = language.hidden_size, (language.vocab_size, language.hidden_size)
    tied = language.tie_word_embeddings
    embedding = Rule(
        "embedding.word_embeddings.weight",
        "vocab",
        (Source(EMBEDDING, vocabulary),),
        other_keys=("output_layer.weight",) if tied else (),
        padded_rows=padded_vocab_size,
    )
    norm = PHI_FINAL_NORM if language.parallel_layers else "model.norm"
    final_norm = [
        Rule(f"decoder.final_layernorm.{part}", "copy", (Source(f"{norm}.{part}", (hidden,)),))
        for part in (("weight", "bias") if language.layer_norm else ("weight",))
    ]
    head = [Rule("output_layer.weight", "vocab", (Source(HEAD, vocabulary),), padded_rows=padded_vocab_size)]
    if language.linear_bias:
        source = Source(HEAD_BIAS, vocabulary[:1])
        head.append(Rule("output_layer.bias", "vocab", (source,), padded_rows=padded_vocab_size))
    layers = _phi_rows(language) if language.parallel_layers else _llama_rows(language)
    return (embedding, *layers, *final_norm, *(() if tied else head))


def _phi_rows(language: LanguageConfig) -> tuple[Rule, ...]:
    """One norm, which no linear owns; every linear has a bias, whole on every rank where its input is divided."""
    hidden, inner = language.hidden_size, language.intermediate_size
    queries = language.num_attention_heads * language.head_dim
    norm = [
        Rule(_key(f"input_layernorm.{part}"), "copy", (_source(f"input_layernorm.{part}", hidden),))
        for part in ("weight", "bias")
    ]
    return (
        *norm,
        _fused_rule(language, "weight", hidden),
        _fused_rule(language, "bias"),
        *_linear_rules("self_attention.linear_proj", "self_attn.dense", "columns", hidden, queries),
        *_linear_rules("mlp.linear_fc1", "mlp.fc1", "rows", inner, hidden),
        *_linear_rules("mlp.linear_fc2", "mlp.fc2", "columns", hidden, inner),
    )


def _linear_rules(key: str, name: str, kind: str, rows: int, columns: int) -> tuple[Rule, Rule]:
    """A linear's weight and bias; the bias of a row-parallel one (``columns``) is not divided."""
    return (
        Rule(_key(f"{key}.weight"), kind, (_source(f"{name}.weight", rows, columns),)),
        Rule(_key(f"{key}.bias"), "copy" if kind == "columns" else kind, (_source(f"{name}.bias", rows),)),
    )


def _llama_rows(language: LanguageConfig) -> tuple[Rule, ...]:
    hidden, inner = language.hidden_size, language.intermediate_size
    queries = language.num_attention_heads * language.head_dim
    return (
        Rule(
            _key("input_layernorm.weight"),
            "copy",
            (_source("input_layernorm.weight", hidden),),
            other_keys=(_key("self_attention.linear_qkv.layer_norm_weight"),),
        ),
        _fused_rule(language, "weight", hidden),
        *([_fused_rule(language, "bias")] if language.qkv_bias else ()),
        *(_head_norm_rules(language) if language.qk_norm else ()),
        Rule(
            _key("self_attention.linear_proj.weight"), "columns", (_source("self_attn.o_proj.weight", hidden, queries),)
        ),
        Rule(
            _key("pre_mlp_layernorm.weight"),
            "copy",
            (_source("post_attention_layernorm.weight", hidden),),
            other_keys=(_key("mlp.linear_fc1.layer_norm_weight"),),
        ),
        Rule(
            _key("mlp.linear_fc1.weight"),
            "rows",
            (_source("mlp.gate_proj.weight", inner, hidden), _source("mlp.up_proj.weight", inner, hidden)),
        ),
        Rule(_key("mlp.linear_fc2.weight"), "columns", (_source("mlp.down_proj.weight", hidden, inner),)),
    )


def _fused_rule(language: LanguageConfig, part: str, *width: int) -> Rule:
    """Weight ([rows, width]) or bias ([rows]) of the linear that makes queries, keys and values at once."""
    queries = language.num_attention_heads * language.head_dim
    keys = language.num_key_value_heads * language.head_dim
    return Rule(
        _key(f"self_attention.linear_qkv.{part}"),
        "qkv",
        (
            _source(f"self_attn.q_proj.{part}", queries, *width),
            _source(f"self_attn.k_proj.{part}", keys, *width),
            _source(f"self_attn.v_proj.{part}", keys, *width),
        ),
        groups=language.num_key_value_heads,
    )


def _head_norm_rules(language: LanguageConfig) -> tuple[Rule, Rule]:
    """The norms of queries and of keys, the same for every head."""
    return tuple(
        Rule(
            _key(f"self_attention.{kind}_layernorm.weight"),
            "copy",
            (_source(f"self_attn.{kind}_norm.weight", language.head_dim),),
        )
        for kind in "qk"
    )


def _source(name: str, *shape: int) -> Source:
    return Source(f"model.layers.{{layer}}.{name}", shape)


def _key(name: str) -> str:
    return f"decoder.layers.{{layer}}.{name}"


def find_rule(table: tuple[Rule, ...], megatron_name: str) -> tuple[Rule, int | None]:
    """The row of a Megatron parameter in any of its spellings, and the layer its name speaks of (None: no layer)."""
    match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..+)", megatron_name)
    key, layer = (f"{match[1]}{{layer}}{match[3]}", int(match[2])) if match else (megatron_name, None)
    for rule in table:
        if key == rule.key or key in rule.other_keys:
            return rule, layer
    raise AssertionError(f"the weights table has no row for {megatron_name}")


def hugging_face_shapes(table: tuple[Rule, ...], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a complete Hugging Face folder holds."""
    shapes = {}
    for rule in table:
        for layer in range(num_layers) if rule.layered else (None,):
            shapes.update(rule.source_shapes(layer))
    return shapes
