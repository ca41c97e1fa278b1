"""The shape of the frozen vision tower and of the pixels that it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dc_megatron.config.json_files import check_sizes, part_of_config, read_json_file
from dc_megatron.errors import UserError

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
        check_sizes(values, _VISION_SIZES, what)
        mean, std = _IMAGE_STATISTICS[family]
        mean = tuple((processor or {}).get("image_mean", mean))
        std = tuple((processor or {}).get("image_std", std))
        return cls(family=family, image_mean=mean, image_std=std, path=path, **values)
