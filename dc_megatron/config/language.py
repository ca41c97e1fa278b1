"""The shape of the language model, from its Hugging Face ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from dc_megatron.config.json_files import check_sizes, part_of_config, read_json_file, refuse_quantised
from dc_megatron.errors import UserError

# What config.json leaves out because it equals the class default (transformers 5.17 LlamaConfig / MistralConfig /
# Qwen2Config / Qwen3Config / PhiConfig); a configuration nested in another, as in LLaVA folders, leaves out whatever
# equals these.
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
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "phi": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "vocab_size": 51200,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "hidden_act": "gelu_new",
    },
}

# Families that the program computes, as messages name them.
_AVAILABLE = "llama (Llama 2/3/3.1/3.2, Vicuna, Yi), mistral, qwen2 (Qwen2, Qwen2.5), qwen3 and phi (Phi-1, 1.5 and 2)"
# The activation of each family's MLP, in all the spellings that mean the same function.
_ACTIVATIONS = {"phi": ("gelu_new", "gelu_pytorch_tanh")}
# What config.json may ask for and this program cannot do, where it is true.
_UNAVAILABLE = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": ("attention_bias", "mlp_bias"),
    # Biases on queries, keys and values are there whatever config.json says; Llama's flags mean other ones.
    "qwen2": (),
    "qwen3": ("attention_bias",),
    # The head has a bias of its own, which a tied head cannot be exported with.
    "phi": ("qk_layernorm", "tie_word_embeddings"),
}

_LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LanguageConfig:
    """Shape of a language model, from its Hugging Face ``config.json``; what the defaults say is Llama's form."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    # Of all norms, whatever their kind.
    rms_norm_eps: float
    rope_theta: float
    # None, or the factor of a llama3 scaling with the constants that megatron-core carries.
    rope_scaling_factor: float | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    # Positions that attention looks back where the model was trained so (Mistral 7B v0.1); None means all.
    sliding_window: int | None = None
    # Biases on queries, keys and values (Qwen2).
    qkv_bias: bool = False
    # RMSNorm over each head's queries and over its keys (Qwen3).
    qk_norm: bool = False
    # Share of a head's channels that are rotated.
    rotary_percent: float = 1.0
    # Phi's form: attention and MLP side by side behind one LayerNorm; an MLP of two linears with tanh-approximated GELU
    # between them; biases on every linear, the head's included.
    parallel_layers: bool = False
    # Dropout behind attention and MLP that config.json asks for (Phi-2: 0.1). Training has none unless it is asked to.
    residual_dropout: float = 0.0
    path: str = ""

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP is silu(gate) * up, three linears; otherwise two."""
        return not self.parallel_layers

    @property
    def linear_bias(self) -> bool:
        """Whether every linear has a bias, the head as well."""
        return self.parallel_layers

    @property
    def layer_norm(self) -> bool:
        """Whether norms are LayerNorm, with a bias; otherwise RMSNorm."""
        return self.parallel_layers

    @property
    def norms_per_layer(self) -> int:
        """Norms over the hidden state in a layer."""
        return 1 if self.parallel_layers else 2

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
            raise UserError(f"{what}: config.json says model_type '{model_type}'; available: {_AVAILABLE}")
        refuse_quantised(config, what)
        values = {"hidden_act": "silu", **_LANGUAGE_DEFAULTS[model_type], **config}
        _refuse_unavailable(model_type, values, what)
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
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
            rms_norm_eps=values["layer_norm_eps" if model_type == "phi" else "rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling_factor=_rope_scaling_factor(rope, what),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=values["max_position_embeddings"],
            sliding_window=_sliding_window(model_type, values),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            rotary_percent=_rotary_percent(model_type, values, rope),
            parallel_layers=model_type == "phi",
            residual_dropout=float(values.get("resid_pdrop") or 0.0),
            path=path,
        )


def _refuse_unavailable(model_type: str, values: dict, what: str) -> None:
    for key in _UNAVAILABLE[model_type]:
        if values.get(key):
            raise UserError(f"{what}: config.json says {key} true, which is not available yet")
    known = _ACTIVATIONS.get(model_type, ("silu",))
    if values["hidden_act"] not in known:
        raise UserError(
            f"{what}: config.json says hidden_act '{values['hidden_act']}'; only {' and '.join(known)} is available"
            f" with model_type {model_type}"
        )


def _rotary_percent(model_type: str, values: dict, rope: dict) -> float:
    """The share of a head that is rotated: transformers 5 writes it into the rope's parameters, 4 beside them.

    Of the families here only Phi's attention reads it; the others rotate whole heads.
    """
    if model_type != "phi":
        return 1.0
    return float(rope.get("partial_rotary_factor") or values["partial_rotary_factor"])


def _sliding_window(model_type: str, values: dict) -> int | None:
    """The positions that any layer looks back at most; None where all layers look back to the start.

    Qwen2 and Qwen3 name a window in every config.json, and use it where ``use_sliding_window`` says so and from layer
    ``max_window_layers`` on (or where ``layer_types`` says so).
    """
    if not model_type.startswith("qwen"):
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
