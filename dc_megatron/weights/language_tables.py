"""The weights table of the Llama family (Llama 2/3/3.1, Vicuna, Yi, Mistral): one row a parameter, both directions.

Layouts are those of megatron-core 0.19 (`GPTModel`) and of transformers 5 (`LlamaForCausalLM`,
`MistralForCausalLM`); rotary weights need no permutation between the two.
"""

from __future__ import annotations

import re

from dc_megatron.config import LanguageConfig
from dc_megatron.weights.rules import Rule, Source

# Buffers in folders of older transformers, computed from the configuration since.
IGNORED_NAMES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


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
    final_norm = Rule("decoder.final_layernorm.weight", "copy", (Source("model.norm.weight", (hidden,)),))
    head = Rule("output_layer.weight", "vocab", (Source(HEAD, vocabulary),), padded_rows=padded_vocab_size)
    return (embedding, *_layer_rows(language), final_norm, *(() if tied else (head,)))


def _layer_rows(language: LanguageConfig) -> tuple[Rule, ...]:
    hidden, inner = language.hidden_size, language.intermediate_size
    queries = language.num_attention_heads * language.head_dim
    keys = language.num_key_value_heads * language.head_dim

    def layer(name: str, *shape: int) -> Source:
        return Source(f"model.layers.{{layer}}.{name}.weight", shape)

    def key(name: str) -> str:
        return f"decoder.layers.{{layer}}.{name}"

    return (
        Rule(
            key("input_layernorm.weight"),
            "copy",
            (layer("input_layernorm", hidden),),
            other_keys=(key("self_attention.linear_qkv.layer_norm_weight"),),
        ),
        Rule(
            key("self_attention.linear_qkv.weight"),
            "qkv",
            (
                layer("self_attn.q_proj", queries, hidden),
                layer("self_attn.k_proj", keys, hidden),
                layer("self_attn.v_proj", keys, hidden),
            ),
            groups=language.num_key_value_heads,
        ),
        Rule(key("self_attention.linear_proj.weight"), "columns", (layer("self_attn.o_proj", hidden, queries),)),
        Rule(
            key("pre_mlp_layernorm.weight"),
            "copy",
            (layer("post_attention_layernorm", hidden),),
            other_keys=(key("mlp.linear_fc1.layer_norm_weight"),),
        ),
        Rule(
            key("mlp.linear_fc1.weight"),
            "gate_up",
            (layer("mlp.gate_proj", inner, hidden), layer("mlp.up_proj", inner, hidden)),
        ),
        Rule(key("mlp.linear_fc2.weight"), "columns", (layer("mlp.down_proj", hidden, inner),)),
    )


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
