"""Models and towers that are known by name, as the contents of their published ``config.json``.

What planning and a dry run need where the folder is not there yet. Typed by hand from the public repositories that
``source`` names; no weights and no folder of theirs was seen by this program.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dc_megatron.config.choices import nearest
from dc_megatron.config.language import LanguageConfig
from dc_megatron.config.vision import VisionConfig
from dc_megatron.errors import UserError


@dataclass(frozen=True)
class Preset:
    """``config``: what matters of config.json. ``source``: the repository on huggingface.co it was typed from.

    ``folders``: base names, in small letters, of folders that are taken for it beside its own and the source's.
    """

    config: dict
    source: str
    folders: tuple[str, ...] = ()
    # The conversation template of stage 2.
    template: str = ""

    def names(self, name: str) -> set[str]:
        return {name, self.source.split("/")[-1].lower(), *self.folders}


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more) -> dict:
    shape = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return shape | more


_LLAMA_3 = {"rope_theta": 500000.0, "max_position_embeddings": 8192}
_LLAMA_3_1 = {
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

LANGUAGE_PRESETS = {
    "phi-2": Preset(
        {
            "model_type": "phi",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 51200,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "partial_rotary_factor": 0.4,
            "rope_theta": 10000.0,
            "qk_layernorm": False,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
        "microsoft/phi-2",
        ("phi2",),
        "phi",
    ),
    "vicuna-7b": Preset(_llama(4096, 11008, 32, 32, 32, 32000), "lmsys/vicuna-7b-v1.5", template="v1"),
    "vicuna-13b": Preset(_llama(5120, 13824, 40, 40, 40, 32000), "lmsys/vicuna-13b-v1.5", template="v1"),
    "llama3-8b": Preset(
        _llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA_3),
        "meta-llama/Meta-Llama-3-8B-Instruct",
        ("llama-3-8b", "meta-llama-3-8b", "llama-3-8b-instruct", "llama3-8b-instruct"),
        "llama_3",
    ),
    "llama3-70b": Preset(
        _llama(8192, 28672, 80, 64, 8, 128256, **_LLAMA_3),
        "meta-llama/Meta-Llama-3-70B-Instruct",
        ("llama-3-70b", "meta-llama-3-70b", "llama-3-70b-instruct", "llama3-70b-instruct"),
        "llama_3",
    ),
    "hermes-2-yi-34b": Preset(
        _llama(7168, 20480, 60, 56, 8, 64000, rope_theta=5000000.0),
        "NousResearch/Nous-Hermes-2-Yi-34B",
        ("yi-34b",),
        "chatml_direct",
    ),
    "llama3.1-8b": Preset(
        _llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA_3_1),
        "meta-llama/Llama-3.1-8B-Instruct",
        ("llama-3.1-8b", "meta-llama-3.1-8b-instruct"),
        "llama_3_chat",
    ),
    "mistral-7b": Preset(
        _llama(4096, 14336, 32, 32, 8, 32000, rope_theta=1000000.0, max_position_embeddings=32768)
        | {"model_type": "mistral", "sliding_window": None},
        "mistralai/Mistral-7B-Instruct-v0.2",
    ),
    "qwen2.5-7b": Preset(
        _llama(3584, 18944, 28, 28, 4, 152064, rope_theta=1000000.0, max_position_embeddings=32768)
        | {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False},
        "Qwen/Qwen2.5-7B-Instruct",
        ("qwen2.5-7b",),
        "chatml_direct",
    ),
}

VISION_PRESETS = {
    "clip-vit-large-patch14-336": Preset(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "openai/clip-vit-large-patch14-336",
        ("clip-l-336", "clip-large-336"),
    ),
    "siglip-so400m-patch14-384": Preset(
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        "google/siglip-so400m-patch14-384",
        ("siglip-so400m",),
    ),
}


def language_preset(where: str) -> Preset | None:
    """The preset of that name, or of the base name of the folder ``where``; None where there is none."""
    base = os.path.basename(os.path.normpath(where)).lower()
    return next((preset for name, preset in LANGUAGE_PRESETS.items() if base in preset.names(name)), None)


def language_shape(where: str, flag: str = "--model_name_or_path") -> LanguageConfig:
    """The shape of the folder ``where``, or else of the preset of that name, or of the folder's base name.

    Its ``path`` is the folder's, or ``preset NAME``. UserError: neither a folder nor a name that is known.
    """
    if os.path.isdir(where):
        return LanguageConfig.from_folder(where, flag)
    name = _preset_name(where, LANGUAGE_PRESETS, flag)
    return LanguageConfig.from_config(LANGUAGE_PRESETS[name].config, f"{flag} {where}", f"preset {name}")


def vision_shape(where: str, flag: str = "--vision_tower") -> VisionConfig:
    """The same for a tower."""
    if os.path.isdir(where):
        return VisionConfig.from_folder(where, flag)
    name = _preset_name(where, VISION_PRESETS, flag)
    return VisionConfig.from_config(VISION_PRESETS[name].config, f"{flag} {where}", None, f"preset {name}")


def _preset_name(where: str, presets: dict[str, Preset], flag: str) -> str:
    base = os.path.basename(os.path.normpath(where)).lower()
    for name, preset in presets.items():
        if base in preset.names(name):
            return name
    raise UserError(
        f"{flag} {where}: no such folder, and no preset is called so{nearest(base, presets)}; presets:"
        f" {', '.join(presets)}"
    )
