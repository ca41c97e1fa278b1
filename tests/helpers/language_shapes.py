"""Shapes of language models as plain values, for tests that build none."""

from __future__ import annotations

from dc_megatron.config import LanguageConfig

# Grouped queries, a head size that is not hidden / heads, llama3 rope scaling, an odd vocabulary.
LLAMA = LanguageConfig(
    model_type="llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=1003,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    rope_scaling_factor=8.0,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    path="tiny",
)
