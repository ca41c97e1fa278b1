"""The shape of the language model, from its Hugging Face ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config.json_files import check_sizes, part_of_config, read_json_file, refuse_quantised
from dc_megatron.errors import UserError

# What config.json leaves out because it equals the class default (transformers 5.17 LlamaConfig / MistralConfig /
# Qwen2Config); a configuration nested in another, as in LLaVA folders, leaves out whatever equals these.
_LANGUAGE_DEFAULTS = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as attention heads
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}

_LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LanguageConfig:
    """Shape of a Llama-family language model, from its Hugging Face ``config.json``."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    # None, or the factor of a llama3 scaling with the constants that megatron-core carries.
    rope_scaling_factor: float | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    # Positions that attention looks back where the model was trained so (Mistral 7B v0.1); None means all.
    sliding_window: int | None = None
    # Biases on queries, keys and values, and on nothing else (Qwen2).
    qkv_bias: bool = False
    path: str = ""

    @classmethod
    def from_folder(cls, folder: str, flag: str = "--model_name_or_path") -> LanguageConfig:
        """Read ``config.json`` of ``folder``; what this program cannot train is refused with the reason."""
        what = f"{flag} {folder}"
        return cls.from_config(read_json_file(folder, "config.json", what), what, folder)

    @classmethod
    def from_config(cls, config: dict, what: str, path: str = "") -> LanguageConfig:
        """The same from the content of ``config.json``; ``what`` begins the UserError."""
        model_type = config.get("model_type")
        if str(model_type) not in _LANGUAGE_DEFAULTS:
            raise UserError(
                f"{what}: config.json says model_type '{model_type}'; available: llama (Llama 2/3/3.1, Vicuna, Yi),"
                " mistral and qwen2 (Qwen2, Qwen2.5)"
            )
        refuse_quantised(config, what)
        # Qwen2 has biases on queries, keys and values whatever config.json says; Llama's flags mean other ones.
        for key in () if model_type == "qwen2" else ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UserError(f"{what}: config.json says {key} true, which is not available yet")
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"{what}: config.json says hidden_act '{config['hidden_act']}'; only silu is available")
        values = {**_LANGUAGE_DEFAULTS[model_type], **config}
        check_sizes(values, _LANGUAGE_SIZES, what)
        # transformers 5 writes rope_parameters; before that it was rope_scaling beside rope_theta.
        rope = part_of_config(config, "rope_parameters", what) or part_of_config(config, "rope_scaling", what)
        heads = values["num_attention_heads"]
        return cls(
            model_type=model_type,
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values["num_key_value_heads"] or heads,
            head_dim=config.get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
            rms_norm_eps=values["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling_factor=_rope_scaling_factor(rope, what),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=values["max_position_embeddings"],
            sliding_window=_sliding_window(model_type, values),
            qkv_bias=model_type == "qwen2",
            path=path,
        )


def _sliding_window(model_type: str, values: dict) -> int | None:
    """The positions that any layer looks back at most; None where all layers look back to the start.

    Qwen2 names a window in every config.json, and uses it where ``use_sliding_window`` says so and from layer
    ``max_window_layers`` on (or where ``layer_types`` says so).
    """
    if model_type != "qwen2":
        return values.get("sliding_window")
    if not values.get("use_sliding_window"):
        return None
    kinds = values.get("layer_types")
    sliding = "sliding_attention" in kinds if kinds else values["max_window_layers"] < values["num_hidden_layers"]
    return values["sliding_window"] if sliding else None


def _rope_scaling_factor(rope: dict, what: str) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{what}: config.json asks for rope type '{kind}'; available: default and llama3")
    # megatron-core hard-codes these three (rotary_pos_embedding.py, apply_scaling).
    fixed = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for key, value in fixed.items():
        if float(rope.get(key, value)) != value:
            raise UserError(f"{what}: rope scaling has {key} {rope[key]}; megatron-core computes {value} only")
    return float(rope["factor"])
