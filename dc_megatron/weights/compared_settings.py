"""What two configurations say of a model that none of its tensors shows: equal bits can be different functions.

sci and dci projectors have the same shapes; a rotary base, the layers read of the tower, an epsilon leave no trace.
"""

from __future__ import annotations

from dc_megatron.config import LanguageConfig, VisionConfig, layer_table, part_of_config
from dc_megatron.weights.hf_llava_format import stock_grid
from dc_megatron.weights.model_parts import ModelFolder

_LANGUAGE = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling_factor",
    "sliding_window",
    "rotary_percent",
    "qk_norm",
    "parallel_layers",
)
_VISION = ("family", "num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")


def differing_settings(a: ModelFolder, b: ModelFolder) -> list[str]:
    """One line for each; of tower and connector where both models have them."""
    found = _differing(_values(a.language, _LANGUAGE), _values(b.language, _LANGUAGE))
    if a.connector and b.connector and a.vision and b.vision:
        found += _differing(_of_pictures(a), _of_pictures(b))
    return found


def differing_stock_settings(a: dict, b: dict, what_a: str, what_b: str) -> list[str]:
    """The same of the contents of two llava-hf folders' config.json. UserError where one is no such model."""
    return _differing(_of_stock(a, what_a), _of_stock(b, what_b))


def _of_pictures(model: ModelFolder) -> dict:
    table = layer_table(model.vision, model.connector)
    layers = {"layers of the tower": [table.final, *map(list, table.groups)]}
    kind = {"mm_dense_connector_type": model.connector.dense_connector_type}
    tiles = {"image_grid_pinpoints": model.image_grid_pinpoints, "mm_patch_merge_type": model.mm_patch_merge_type}
    return {**kind, **layers, **_values(model.vision, _VISION), **tiles}


def _of_stock(config: dict, what: str) -> dict:
    text = {"model_type": "llama", **part_of_config(config, "text_config", what)}
    tower = {"model_type": "clip_vision_model", **part_of_config(config, "vision_config", what)}
    vision = VisionConfig.from_config(tower, what)
    layers = config.get("vision_feature_layer", -2)
    depth = vision.num_hidden_layers
    # Both spellings of a hidden state: from the end and, where towers end at different depths, from the start.
    if type(layers) is int:
        layers = [layers]
    if isinstance(layers, list):
        layers = [layer + depth + 1 if type(layer) is int and layer < 0 else layer for layer in layers]
    return {
        "model_type": config["model_type"],
        **_values(LanguageConfig.from_config(text, what), _LANGUAGE),
        **_values(vision, _VISION),
        "vision_feature_layer": layers,
        "dense_connector_layers": config.get("dense_connector_layers"),
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "image_grid_pinpoints": stock_grid(config),
    }


def _values(config: LanguageConfig | VisionConfig, names: tuple[str, ...]) -> dict:
    return {name: getattr(config, name) for name in names}


def _differing(a: dict, b: dict) -> list[str]:
    return [f"config: {name} {a[name]} in A, {b[name]} in B" for name in a if a[name] != b[name]]
