"""The two towers of LLaVA and DenseConnector by their hub names, for models that carry a tower's weights alone.

Typed from the ``config.json`` and ``preprocessor_config.json`` that their authors published: what differs from the
defaults of transformers' classes, and the rest of the vision part for readers that have other defaults.
"""

from __future__ import annotations

from dc_megatron.config import VisionConfig

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
_CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 384, "width": 384},
}

_OWNERS = {"clip": "openai", "siglip": "google"}
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")

# Last part of the hub's name -> (config.json of the vision model, preprocessor_config.json).
PUBLIC_TOWERS = {
    "clip-vit-large-patch14-336": (_CLIP, _CLIP_PROCESSOR),
    "siglip-so400m-patch14-384": (_SIGLIP, _SIGLIP_PROCESSOR),
}


def public_tower_name(vision: VisionConfig) -> str:
    """The hub's name of the public tower that has the shape of ``vision``, or ""."""
    for name, (config, _) in PUBLIC_TOWERS.items():
        if config["model_type"] == vision.about.model_type and all(
            config[key] == getattr(vision, key) for key in _SHAPE
        ):
            return f"{_OWNERS[vision.family]}/{name}"
    return ""
