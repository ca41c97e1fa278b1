"""Makers of tiny Hugging Face folders: language models and vision towers, fp32, seeded, written by transformers.

Every maker takes the folder to write (made if absent) and returns it as a string. No two parameters are alike, norms
and biases included: a swap of two names, or a bias forgotten, changes the numbers.
"""

import json
import os
import zlib

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

ODD_VOCABULARY = 1003
_TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(
    folder,
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 8,
    kv_heads: int = 4,
    intermediate: int = 96,
    vocab: int = 256,
    tied: bool = False,
    rope_factor: float | None = None,
    seed: int = 0,
    **overrides,
) -> str:
    """A Llama with grouped key-value heads that TP 1, 2 and 4 divide; ``rope_factor`` asks for llama3 scaling."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if rope_factor is not None:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": rope_factor,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=2048 if rope_factor is None else 131072,
        rope_parameters=rope,
        **{"bos_token_id": 1, "eos_token_id": 2, **overrides},
    )
    return _save(LlamaForCausalLM, config, folder, seed)


def tiny_mistral(folder, *, seed: int = 0, **overrides) -> str:
    """A Mistral whose head dimension is not hidden / heads; no sliding window, as in the models after v0.1."""
    values = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 256,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return _save(MistralForCausalLM, MistralConfig(**{**values, **overrides}), folder, seed)


def tiny_qwen2(folder, *, seed: int = 0, **overrides) -> str:
    """A Qwen2 with grouped key-value heads: biases on queries, keys and values, a window that is named but not used."""
    values = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 2,
    }
    return _save(Qwen2ForCausalLM, Qwen2Config(**{**values, **overrides}), folder, seed)


def tiny_qwen3(folder, *, seed: int = 0, **overrides) -> str:
    """A Qwen3: norms over each head's queries and keys, a head dimension that is not hidden / heads, no biases."""
    values = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    return _save(Qwen3ForCausalLM, Qwen3Config(**{**values, **overrides}), folder, seed)


def tiny_phi(folder, *, seed: int = 0, **overrides) -> str:
    """A Phi: one LayerNorm before attention and MLP, biases everywhere, of 20 channels a head 8 are rotated."""
    values = {
        "num_hidden_layers": 4,
        "hidden_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "intermediate_size": 128,
        "vocab_size": ODD_VOCABULARY,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _save(PhiForCausalLM, PhiConfig(**{**values, **overrides}), folder, seed)


def tiny_clip(folder, *, layers: int = 6, hidden: int = 32, image_size: int = 28, seed: int = 0) -> str:
    """A CLIP vision tower: 16 patches (by default) and the CLS token."""
    return _save(CLIPVisionModel, _clip_config(layers, hidden, image_size), folder, seed)


def tiny_siglip(folder, *, layers: int = 6, hidden: int = 32, image_size: int = 35, seed: int = 0) -> str:
    """A SigLIP vision tower: 25 patches by default, which STI's pool of 8 does not divide, and no CLS."""
    return _save(SiglipVisionModel, _siglip_config(layers, hidden, image_size), folder, seed)


def tiny_full_clip(folder, *, layers: int = 6, hidden: int = 32, image_size: int = 28, seed: int = 0) -> str:
    """A whole CLIP: the vision tower nested beside a text tower and projections. Its tower equals `tiny_clip`'s."""
    vision = _clip_config(layers, hidden, image_size)
    config = CLIPConfig(vision_config=vision.to_dict(), text_config=dict(_TEXT_TOWER), projection_dim=16)
    return _save(CLIPModel, config, folder, seed, vision)


def tiny_full_siglip(folder, *, layers: int = 6, hidden: int = 32, image_size: int = 35, seed: int = 0) -> str:
    """A whole SigLIP: the vision tower nested beside a text tower. Its tower equals `tiny_siglip`'s."""
    vision = _siglip_config(layers, hidden, image_size)
    return _save(
        SiglipModel,
        SiglipConfig(vision_config=vision.to_dict(), text_config=dict(_TEXT_TOWER)),
        folder,
        seed,
        vision,
    )


def tiny_dinov2(folder, *, layers: int = 6, hidden: int = 32, image_size: int = 28, seed: int = 0) -> str:
    """A DINOv2: 16 patches and a class token; a tower of another family than the original's."""
    config = Dinov2Config(
        hidden_size=hidden,
        mlp_ratio=2,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=7,
    )
    return _save(Dinov2Model, config, folder, seed)


LANGUAGE_MAKERS = {
    "llama": lambda folder: tiny_llama(folder, kv_heads=8),
    "llama_gqa": tiny_llama,
    "llama_tied": lambda folder: tiny_llama(folder, tied=True),
    "llama3_rope": lambda folder: tiny_llama(folder, rope_factor=8.0),
    "llama_odd_vocabulary": lambda folder: tiny_llama(folder, vocab=ODD_VOCABULARY),
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "phi": tiny_phi,
    "qwen2_tied": lambda folder: tiny_qwen2(folder, tie_word_embeddings=True, vocab_size=ODD_VOCABULARY),
}
VISION_MAKERS = {
    "clip": tiny_clip,
    "dinov2": tiny_dinov2,
    "siglip": tiny_siglip,
    "full_clip": tiny_full_clip,
    "full_siglip": tiny_full_siglip,
}


def as_old_bin(source, folder, *, shards: int = 1, extra: dict[str, torch.Tensor] | None = None) -> str:
    """The model folder ``source`` once more as ``pytorch_model.bin``, or as that many .bin shards with an index.

    ``extra`` tensors are added, such as the ``rotary_emb.inv_freq`` and ``position_ids`` that old folders carry.
    """
    tensors = {**_read_safetensors(source), **(extra or {})}
    _copy_json(source, folder)
    names = ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    parts = [{k: tensors[k] for k in sorted(tensors)[i::shards]} for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, os.path.join(folder, name))
    if shards > 1:
        _write_index(folder, "pytorch_model.bin.index.json", names, parts)
    return str(folder)


def as_safetensors(source, folder, *, shards: int = 1, prefix: str = "", drop: tuple[str, ...] = (), extra=None) -> str:
    """The model folder ``source`` once more, split over ``shards`` files with an index when there are several.

    ``prefix`` goes in front of every name; names that start with one of ``drop`` are left out; ``extra`` is added.
    """
    tensors = {prefix + k: v for k, v in _read_safetensors(source).items() if not (drop and k.startswith(drop))}
    tensors.update(extra or {})
    _copy_json(source, folder)
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = [{k: tensors[k] for k in sorted(tensors)[i::shards]} for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, os.path.join(folder, name), metadata={"format": "pt"})
    if shards > 1:
        _write_index(folder, "model.safetensors.index.json", names, parts)
    return str(folder)


def _clip_config(layers: int, hidden: int, image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=7,
    )


def _siglip_config(layers: int, hidden: int, image_size: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=7,
    )


def _save(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder, seed: int, vision: PretrainedConfig = None
) -> str:
    """Build, randomise and save; ``vision`` is the tower's configuration where it is nested in a larger model."""
    model = model_class(config)
    _randomise(model, seed)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    vision = vision or (config if model_class in (CLIPVisionModel, SiglipVisionModel) else None)
    if vision is not None:
        _write_processor(folder, vision)
    return str(folder)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Normal weights of deviation 1/sqrt(fan-in), norms near one, biases near zero, drawn from ``seed`` and the name.

    Names start at the vision tower, so that a nested tower equals one saved alone.
    """
    for name, parameter in model.named_parameters():
        name = name.removeprefix("vision_model.")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.ndim < 2:
            value = 0.1 * noise
        else:
            value = noise * parameter[0].numel() ** -0.5
        with torch.no_grad():
            parameter.copy_(value)


def _write_processor(folder, vision: PretrainedConfig) -> None:
    """preprocessor_config.json of the family, with this tower's image size."""
    size = vision.image_size
    clip = isinstance(vision, CLIPVisionConfig)
    content = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "do_center_crop": clip,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size} if clip else {"height": size, "width": size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if clip else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if clip else [0.5, 0.5, 0.5],
    }
    if clip:
        content["crop_size"] = {"height": size, "width": size}
    with open(os.path.join(folder, "preprocessor_config.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)


def _read_safetensors(folder) -> dict[str, torch.Tensor]:
    return load_file(os.path.join(folder, "model.safetensors"))


def _copy_json(source, folder) -> None:
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(source):
        if name.endswith(".json"):
            with open(os.path.join(source, name), encoding="utf-8") as file:
                content = file.read()
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(content)


def _write_index(folder, name: str, files: list[str], parts: list[dict]) -> None:
    weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    total = sum(t.numel() * t.element_size() for part in parts for t in part.values())
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file)
