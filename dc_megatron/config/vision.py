"""The shape of the frozen vision tower and of the pixels that it takes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from dc_megatron.config.json_files import check_sizes, part_of_config, read_json_file
from dc_megatron.config.towers import TOWERS, TowerFamily, tower_family
from dc_megatron.errors import UserError

_VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
# What the configuration classes of transformers take, under names that all families share.
_VALUES = (*_VISION_SIZES, "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a frozen Hugging Face vision tower and of the pixels it takes."""

    family: str  # a row of config.towers.TOWERS
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
        return self.about.prefix_tokens

    @property
    def about(self) -> TowerFamily:
        """What is known of its family."""
        return TOWERS[self.family]

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that shapes of ``about`` name."""
        return {
            "width": self.hidden_size,
            "inner": self.intermediate_size,
            "patch": self.patch_size,
            "positions": self.num_patches + self.num_prefix_tokens,
        }

    def hugging_face_values(self, layers: int) -> dict:
        """Arguments of the family's configuration class in transformers, for a tower of ``layers`` blocks."""
        family = self.about
        values = {name: getattr(self, name) for name in _VALUES if name != "num_hidden_layers"}
        values["num_hidden_layers"] = layers
        if family.ratio:
            values[family.ratio] = values.pop("intermediate_size") // self.hidden_size
        return {**values, **family.built_with}

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """RGB of the canvas in ``pad`` mode, as the original: int(mean * 255)."""
        return tuple(int(m * 255) for m in self.image_mean)

    @classmethod
    def from_folder(cls, folder: str, flag: str = "--vision_tower") -> VisionConfig:
        """Read ``config.json`` (a vision model, or a larger model whose vision part is used) of ``folder``."""
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
        family = tower_family(model_type)
        if family is None:
            raise UserError(f"{what}: config.json says model_type '{model_type}', {_unknown(model_type)}")
        config = part_of_config(config, "vision_config", what) if "vision_config" in config else config
        values = {name: config.get(name, default) for name, default in family.defaults.items()}
        if family.ratio:
            check_sizes(values, ("hidden_size", family.ratio), what)
            values["intermediate_size"] = values["hidden_size"] * values.pop(family.ratio)
        for name, value in family.refused.items():
            if name in config and config[name] == value:
                raise UserError(f"{what}: config.json says {name} {json.dumps(value)}, which is not available")
        check_sizes(values, _VISION_SIZES, what)
        mean, std = family.statistics
        mean = tuple((processor or {}).get("image_mean", mean))
        std = tuple((processor or {}).get("image_std", std))
        return cls(family=family.name, image_mean=mean, image_std=std, path=path, **values)


def _unknown(model_type: object) -> str:
    """Why there is no tower of ``model_type``, and what there is."""
    if str(model_type).startswith("siglip2"):
        return (
            "SigLIP 2 with variable resolution (NaFlex), which is not available; one with a fixed resolution is, whose"
            " config.json says siglip"
        )
    names = ", ".join(f"{row.name} ({row.model_type})" for row in TOWERS.values())
    return f"which is no vision tower known here; give a folder of one of: {names}"
