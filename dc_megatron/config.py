"""Shapes and settings of a run as plain values: the tower, the connector, the language model and the data.

Everything here is read from Hugging Face ``config.json`` files or typed from public configurations, and none of it
needs torch. ``image_tokens`` is the one place that knows how many positions a picture takes.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass

from dc_megatron.errors import UserError

CONNECTOR_TYPES = ("sti", "sci", "dci", "none")
PROJECTOR_TYPES = ("mlp2x_gelu",)
TEMPLATES = ("plain", "v1", "llama_3", "llama_3_chat", "mpt", "chatml_direct")
IMAGE_ASPECT_RATIOS = ("square", "pad")

# STI pools this many neighbouring tokens of a lower layer into one (AvgPool1d(8, 8), remainder dropped).
STI_POOL = 8

# transformers leaves a value out of config.json when it equals the class default, so the defaults are needed here
# (transformers 5.17 CLIPVisionConfig / SiglipVisionConfig) together with the processors' mean and deviation.
_VISION_DEFAULTS = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_IMAGE_STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

# The same for language models (transformers 5.17 LlamaConfig / MistralConfig / Qwen2Config): a configuration nested in
# another, as in LLaVA folders, leaves out whatever equals these.
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

# (family, layers of the tower) -> the two lower layers of STI and SCI. Indices count HF hidden_states, 0 is the
# encoder's input. The first and fourth rows are the original's; the others sit at 1/3 and 2/3 of the depth likewise.
_SPARSE_LAYERS = {
    ("clip", 24): (7, 15),
    ("clip", 12): (3, 7),
    ("clip", 32): (10, 20),
    ("siglip", 27): (7, 15),
    ("siglip", 12): (3, 7),
    ("siglip", 24): (7, 15),
}


def nearest(value: str, choices) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    match = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.4)
    return f" (did you mean '{match[0]}'?)" if match else ""


def one_of(value: str, choices, flag: str) -> str:
    """``value`` if it is among ``choices``; otherwise a UserError that names ``flag`` and the nearest choice."""
    if value not in choices:
        raise UserError(f"{flag} {value}: unknown{nearest(value, choices)}; one of: {', '.join(choices)}")
    return value


def read_json_file(folder: str, name: str, what: str) -> dict:
    """The object in ``folder/name``; a UserError that says ``what`` the folder should be when it cannot be read."""
    path = os.path.join(folder, name)
    if not os.path.isdir(folder):
        raise UserError(f"{what}: no such folder: {folder}")
    if not os.path.isfile(path):
        raise UserError(f"{what}: {folder} has no {name}; give a Hugging Face model folder")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} holds a {type(content).__name__}, not an object")
    return content


def _check_sizes(values: dict, keys: tuple[str, ...], what: str) -> None:
    """UserError where one of ``keys`` of a config.json is no size; ``what`` begins it."""
    for key in keys:
        if type(values[key]) is not int or values[key] < 1:
            raise UserError(f"{what}: config.json says {key} {values[key]!r}; it must be a whole number above 0")


def part_of_config(config: dict, key: str, what: str) -> dict:
    """The object at ``key`` of a config.json, {} where there is none."""
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"{what}: config.json says {key} {part!r}; it must be an object")
    return part


def refuse_quantised(config: dict, what: str) -> None:
    """UserError for weights in a quantised format: their tensors are codes and scales."""
    if config.get("quantization_config"):
        method = part_of_config(config, "quantization_config", what).get("quant_method", "of an unnamed method")
        raise UserError(
            f"{what}: config.json has a quantization_config ({method}); give the model in bf16, fp16 or fp32, or take"
            " the entry out where the weights are not quantised"
        )


_LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a frozen Hugging Face vision tower and of the pixels it takes."""

    family: str  # "clip" or "siglip"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    path: str = ""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches that no connector uses: CLIP's CLS."""
        return 1 if self.family == "clip" else 0

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """RGB of the canvas in ``pad`` mode, as the original: int(mean * 255)."""
        return tuple(int(m * 255) for m in self.image_mean)

    @classmethod
    def from_folder(cls, folder: str, flag: str = "--vision_tower") -> VisionConfig:
        """Read ``config.json`` (a vision model, or a full CLIP / SigLIP whose vision part is used) of ``folder``."""
        what = f"{flag} {folder}"
        config = read_json_file(folder, "config.json", what)
        processor = None
        if os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
            processor = read_json_file(folder, "preprocessor_config.json", what)
        return cls.from_config(config, what, processor, folder)

    @classmethod
    def from_config(cls, config: dict, what: str, processor: dict | None = None, path: str = "") -> VisionConfig:
        """The same from the contents of ``config.json`` and, where there is one, ``preprocessor_config.json``.

        ``what`` begins the UserError for a configuration that is no tower known here.
        """
        model_type = config.get("model_type")
        family = {
            "clip": "clip",
            "clip_vision_model": "clip",
            "siglip": "siglip",
            "siglip_vision_model": "siglip",
        }.get(str(model_type))
        if family is None:
            raise UserError(
                f"{what}: config.json says model_type '{model_type}', which is no vision tower known here;"
                " give a CLIP or SigLIP folder"
            )
        values = dict(_VISION_DEFAULTS[family])
        config = part_of_config(config, "vision_config", what) if "vision_config" in config else config
        values.update({k: v for k, v in config.items() if k in values})
        _check_sizes(values, _VISION_SIZES, what)
        mean, std = _IMAGE_STATISTICS[family]
        mean = tuple((processor or {}).get("image_mean", mean))
        std = tuple((processor or {}).get("image_std", std))
        return cls(family=family, image_mean=mean, image_std=std, path=path, **values)


@dataclass(frozen=True)
class ConnectorConfig:
    """Which layers of the tower are fed to the language model, and the projector behind them."""

    dense_connector_type: str = "dci"
    projector_type: str = "mlp2x_gelu"
    # Index into hidden_states of the final feature of CLIP; SigLIP ignores it, as the original does.
    select_layer: int = -2

    def __post_init__(self):
        one_of(self.dense_connector_type, CONNECTOR_TYPES, "--mm_dense_connector_type")
        one_of(self.projector_type, PROJECTOR_TYPES, "--mm_projector_type")
        if type(self.select_layer) is not int:
            raise UserError(f"--mm_vision_select_layer {self.select_layer!r}: it must be a whole number, such as -2")

    def input_size(self, vision: VisionConfig) -> int:
        """Channels that enter the projector."""
        return vision.hidden_size * (3 if self.dense_connector_type in ("sci", "dci") else 1)


@dataclass(frozen=True)
class LayerTable:
    """Indices into HF ``hidden_states`` that a connector reads.

    ``final`` is the feature LLaVA would use; ``groups`` are the lower features in the connector's order, each the
    mean over its layers (one layer for STI and SCI).
    """

    final: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def deepest(self) -> int:
        """The highest index read: layers of the tower above it need not run."""
        return max([self.final, *(i for group in self.groups for i in group)])


def layer_table(vision: VisionConfig, connector: ConnectorConfig) -> LayerTable:
    """The layers of ``vision`` that ``connector`` reads.

    CLIP: the final feature is hidden_states[select_layer]. SigLIP: the input of the last layer, without
    post-layernorm. DCI averages two halves of the layers below the last index.
    """
    depth = vision.num_hidden_layers
    if vision.family == "clip":
        final = connector.select_layer if connector.select_layer >= 0 else depth + 1 + connector.select_layer
        if not 0 <= final <= depth:
            raise UserError(
                f"--mm_vision_select_layer {connector.select_layer}: the tower has {depth} layers;"
                f" choose from {-depth - 1} to {depth}"
            )
        halves = (tuple(range(depth // 2)), tuple(range(depth // 2, depth)))
    else:
        final = depth - 1
        halves = (tuple(range((depth - 1) // 2)), tuple(range((depth - 1) // 2, depth - 1)))
    kind = connector.dense_connector_type
    if kind == "none":
        return LayerTable(final, ())
    if kind == "dci":
        if depth < 3:
            raise UserError(f"--mm_dense_connector_type dci: the tower has {depth} layers; it needs at least 3")
        return LayerTable(final, halves)
    low, high = _SPARSE_LAYERS.get((vision.family, depth), (depth // 3 - 1, 2 * depth // 3 - 1))
    if low < 0:
        raise UserError(f"--mm_dense_connector_type {kind}: the tower has {depth} layers; it needs at least 3")
    return LayerTable(final, ((low,), (high,)))


def image_tokens(vision: VisionConfig, connector: ConnectorConfig) -> int:
    """Positions of the language model's sequence that one picture takes."""
    tokens = vision.num_patches
    if connector.dense_connector_type == "sti":
        tokens += 2 * (vision.num_patches // STI_POOL)
    return tokens


def image_share(count: int, rank: int, size: int) -> range:
    """Which of the ``count`` images of a micro-batch rank ``rank`` of ``size`` encodes.

    With c = ceil(count / size): c from rank * c on; the last ranks may have fewer, or none.
    """
    width = -(-count // size)
    return range(min(count, rank * width), min(count, (rank + 1) * width))


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
        _check_sizes(values, _LANGUAGE_SIZES, what)
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


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisor: int = 128) -> int:
    """Rows of the embedding as Megatron pads them: up to a multiple of divisor * tensor-parallel size."""
    multiple = divisor * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple


def check_parallel_layout(language: LanguageConfig, tensor: int, pipeline: int, uneven_split: bool = False) -> None:
    """Refuse tensor and pipeline sizes that do not divide the model, naming those that do.

    tensor and pipeline are world sizes of the two groups; ``uneven_split`` says that the user gave the engine an
    explicit division of layers.
    """
    sizes = {
        "attention heads": language.num_attention_heads,
        "key-value heads": language.num_key_value_heads,
        "channels of intermediate_size": language.intermediate_size,
    }
    layers = language.num_hidden_layers
    fits = [t for t in range(1, language.num_key_value_heads + 1) if not any(size % t for size in sizes.values())]
    if tensor not in fits:
        wrong = " and ".join(f"{size} {what}" for what, size in sizes.items() if tensor < 1 or size % tensor)
        raise UserError(
            f"--tensor-model-parallel-size {tensor}: does not divide {wrong} of {language.path or 'the model'};"
            f" values that do: {', '.join(map(str, fits))}"
        )
    if layers % pipeline and not uneven_split:
        divisors = [p for p in range(1, layers + 1) if layers % p == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {pipeline}: does not divide {layers} layers; values that do:"
            f" {', '.join(map(str, divisors))}; or give --decoder-first-pipeline-num-layers /"
            " --decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )


@dataclass(frozen=True)
class DataConfig:
    """What the data room needs to know; primitives only, so that it can be stored and hashed."""

    data_path: str
    image_folder: str
    tokenizer_path: str
    version: str
    image_aspect_ratio: str
    model_max_length: int
    seq_length: int
    tokens_per_image: int
    order: str = "shuffled"
    seed: int = 1234
    image_backend: str = "auto"
    max_bad_sample_rate: float = 0.001
    # Ids of the language model; no sample may hold another. 0: not checked.
    vocab_size: int = 0

    def __post_init__(self):
        one_of(self.version, TEMPLATES, "--version")
        one_of(self.image_aspect_ratio, IMAGE_ASPECT_RATIOS, "--image_aspect_ratio")
        one_of(self.order, ("shuffled", "sequential"), "--data-order")
        one_of(self.image_backend, ("auto", "dali", "pil"), "--image-backend")
        if self.model_max_length > self.seq_length:
            raise UserError(
                f"--model_max_length {self.model_max_length}: longer than --seq-length {self.seq_length};"
                " raise --seq-length or lower --model_max_length"
            )
