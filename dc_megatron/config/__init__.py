"""Shapes and settings of a run as plain values: the tower, the connector, the language model and the data.

Everything here is read from Hugging Face ``config.json`` files or typed from public configurations, and none of it
needs torch. Other rooms import from here, not from the files inside.
"""

from dc_megatron.config.choices import (
    CONNECTOR_TYPES,
    IMAGE_ASPECT_RATIOS,
    PROJECTOR_TYPES,
    TEMPLATES,
    nearest,
    one_of,
)
from dc_megatron.config.connector import (
    STI_POOL,
    ConnectorConfig,
    LayerTable,
    dealt_tiles,
    image_share,
    image_tokens,
    layer_table,
)
from dc_megatron.config.data import PACKINGS, DataConfig, DataSource
from dc_megatron.config.json_files import part_of_config, read_json_file, refuse_quantised
from dc_megatron.config.language import LanguageConfig
from dc_megatron.config.lora import AdaptedLinear, HuggingFaceLinear, LoraConfig
from dc_megatron.config.parallel import check_parallel_layout, padded_vocab_size
from dc_megatron.config.presets import (
    LANGUAGE_PRESETS,
    VISION_PRESETS,
    Preset,
    language_preset,
    language_shape,
    vision_shape,
)
from dc_megatron.config.tiling import (
    MERGE_TYPES,
    ImageTiling,
    PictureTiles,
    best_resolution,
    default_pinpoints,
    fitted_size,
    image_tiling,
    read_pinpoints,
    tiling_of_flags,
)
from dc_megatron.config.towers import TOWERS, TowerFamily, tower_family
from dc_megatron.config.vision import VisionConfig

__all__ = [
    "CONNECTOR_TYPES",
    "IMAGE_ASPECT_RATIOS",
    "LANGUAGE_PRESETS",
    "MERGE_TYPES",
    "PACKINGS",
    "PROJECTOR_TYPES",
    "STI_POOL",
    "TEMPLATES",
    "TOWERS",
    "VISION_PRESETS",
    "AdaptedLinear",
    "ConnectorConfig",
    "DataConfig",
    "DataSource",
    "HuggingFaceLinear",
    "ImageTiling",
    "LanguageConfig",
    "LayerTable",
    "LoraConfig",
    "PictureTiles",
    "Preset",
    "TowerFamily",
    "VisionConfig",
    "best_resolution",
    "check_parallel_layout",
    "dealt_tiles",
    "default_pinpoints",
    "fitted_size",
    "image_share",
    "image_tiling",
    "image_tokens",
    "language_preset",
    "language_shape",
    "layer_table",
    "nearest",
    "one_of",
    "padded_vocab_size",
    "part_of_config",
    "read_json_file",
    "read_pinpoints",
    "refuse_quantised",
    "tiling_of_flags",
    "tower_family",
    "vision_shape",
]
