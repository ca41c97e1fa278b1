"""The families of Hugging Face vision towers: all that the program knows of each is its row of ``TOWERS``.

Any model qualifies that turns pixels into patches, runs blocks of which each takes and gives [n, tokens, width], and is
a class of transformers. docs/models.md says how a row is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# A dimension of a tensor: a number, or the name of one in ``VisionConfig.dimensions``.
Shape = tuple[int | str, ...]

_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class TowerFamily:
    """name: ``VisionConfig.family``. model_type: of the tower alone in config.json; holders: of models that have it as
    ``vision_config``. config_class, model_class: names in transformers.

    defaults: what the configuration's class takes where config.json leaves it out (transformers does not write values
    that equal it). statistics: mean and deviation of pixels where no preprocessor_config.json says them.
    prefix_tokens: tokens in front of the patches that no connector uses. ends_early: the final feature is the input
    of the last block, whatever select_layer says. crops: in ``square`` mode the shortest edge is resized and the rest
    cut off, as CLIP's processor does; otherwise both edges are resized.

    blocks: path of the blocks in the model in memory. outer, block: shapes of the tensors around them and of each, in
    the order in which the model holds them.
    optional: those of ``outer`` that the hidden states do not depend on. level: what files put in front of all names.

    ratio: the entry of config.json that gives the MLP's width as a multiple of the tower's, where there is one.
    refused: entries of config.json with a value that asks for another model. built_with: further arguments of the
    configuration's class, whatever config.json says. stock_llava: whether transformers' Llava was tried with it.
    """

    name: str
    model_type: str
    holders: tuple[str, ...]
    config_class: str
    model_class: str
    defaults: Mapping[str, object]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    blocks: str
    outer: Mapping[str, Shape]
    block: Mapping[str, Shape]
    optional: tuple[str, ...] = ()
    level: str = ""
    prefix_tokens: int = 0
    ends_early: bool = False
    crops: bool = True
    ratio: str = ""
    refused: Mapping[str, object] = field(default_factory=dict)
    built_with: Mapping[str, object] = field(default_factory=dict)
    stock_llava: bool = False


def _linear(name: str, rows: str, columns: str) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str) -> dict[str, Shape]:
    return {f"{name}.weight": ("width",), f"{name}.bias": ("width",)}


# Of CLIP and SigLIP, which hold the same in another order.
_ATTENTION = {
    **{k: v for part in "kvq" for k, v in _linear(f"self_attn.{part}_proj", "width", "width").items()},
    **_linear("self_attn.out_proj", "width", "width"),
}
_MLP = {**_linear("mlp.fc1", "inner", "width"), **_linear("mlp.fc2", "width", "inner")}
_POST_NORM = tuple(_norm("post_layernorm"))

_CLIP = TowerFamily(
    name="clip",
    model_type="clip_vision_model",
    holders=("clip",),
    config_class="CLIPVisionConfig",
    model_class="CLIPVisionModel",
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    statistics=_OPENAI,
    blocks="encoder.layers",
    outer={
        "embeddings.class_embedding": ("width",),
        "embeddings.patch_embedding.weight": ("width", 3, "patch", "patch"),
        "embeddings.position_embedding.weight": ("positions", "width"),
        # The spelling is transformers'.
        **_norm("pre_layrnorm"),
        **_norm("post_layernorm"),
    },
    block={**_ATTENTION, **_norm("layer_norm1"), **_MLP, **_norm("layer_norm2")},
    optional=_POST_NORM,
    level="vision_model.",
    prefix_tokens=1,
    stock_llava=True,
)

# SigLIP 2 with a fixed resolution is published under SigLIP's model_type and is the same model.
_SIGLIP = TowerFamily(
    name="siglip",
    model_type="siglip_vision_model",
    holders=("siglip",),
    config_class="SiglipVisionConfig",
    model_class="SiglipVisionModel",
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    statistics=_HALF,
    blocks="encoder.layers",
    outer={
        "embeddings.patch_embedding.weight": ("width", 3, "patch", "patch"),
        "embeddings.patch_embedding.bias": ("width",),
        "embeddings.position_embedding.weight": ("positions", "width"),
        **_norm("post_layernorm"),
    },
    block={**_norm("layer_norm1"), **_ATTENTION, **_norm("layer_norm2"), **_MLP},
    optional=_POST_NORM,
    level="vision_model.",
    ends_early=True,
    crops=False,
    # The pooling head is read by no connector, and is in few folders.
    built_with={"vision_use_head": False},
    stock_llava=True,
)

_DINOV2 = TowerFamily(
    name="dinov2",
    model_type="dinov2",
    holders=(),
    config_class="Dinov2Config",
    model_class="Dinov2Model",
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    statistics=_IMAGENET,
    blocks="encoder.layer",
    outer={
        "embeddings.cls_token": (1, 1, "width"),
        "embeddings.mask_token": (1, "width"),
        "embeddings.position_embeddings": (1, "positions", "width"),
        "embeddings.patch_embeddings.projection.weight": ("width", 3, "patch", "patch"),
        "embeddings.patch_embeddings.projection.bias": ("width",),
        **_norm("layernorm"),
    },
    block={
        **_norm("norm1"),
        **{
            k: v
            for part in ("query", "key", "value")
            for k, v in _linear(f"attention.attention.{part}", "width", "width").items()
        },
        **_linear("attention.output.dense", "width", "width"),
        "layer_scale1.lambda1": ("width",),
        **_norm("norm2"),
        **_MLP,
        "layer_scale2.lambda1": ("width",),
    },
    optional=("embeddings.mask_token", *_norm("layernorm")),
    prefix_tokens=1,
    ratio="mlp_ratio",
    refused={"use_swiglu_ffn": True, "qkv_bias": False},
)

TOWERS: dict[str, TowerFamily] = {row.name: row for row in (_CLIP, _SIGLIP, _DINOV2)}


def tower_family(model_type: object) -> TowerFamily | None:
    """The family of a config.json's ``model_type``, of the tower alone or of a model that holds it."""
    for row in TOWERS.values():
        if model_type == row.model_type or model_type in row.holders:
            return row
    return None
