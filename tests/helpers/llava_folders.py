"""Tiny folders in LLaVA's own format, and exports written to disk in the plainest way."""

from __future__ import annotations

import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.weights.export_plan import Export
from dc_megatron.weights.projector_files import projector_shapes
from dc_megatron.weights.tensor_reader import TensorReader, read_tensor


def random_projector(
    connector: ConnectorConfig, vision: VisionConfig, width: int, seed: int = 5
) -> dict[str, torch.Tensor]:
    """``mlp.{0,2}.{weight,bias}`` of a size that the language model takes seriously."""
    generator = torch.Generator().manual_seed(seed)
    shapes = projector_shapes(connector, vision, width)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        for name, shape in shapes.items()
    }


def llava_folder(
    folder,
    language: str,
    tower: str,
    connector: ConnectorConfig,
    *,
    inside: bool = False,
    dtype: torch.dtype = torch.float32,
    drop: tuple[str, ...] = (),
    extra: dict[str, torch.Tensor] | None = None,
    **config,
) -> str:
    """A LLaVA / DenseConnector folder over the folders of a language model and a tower.

    ``inside`` puts the tower's weights in, without SigLIP's last layer as the original leaves them; names that start
    with one of ``drop`` are left out and ``extra`` is added; ``config`` overrides config.json (None removes).
    """
    vision = VisionConfig.from_folder(tower)
    with open(os.path.join(language, "config.json"), encoding="utf-8") as file:
        text = json.load(file)
    projector = random_projector(connector, vision, text["hidden_size"])
    tensors = load_file(os.path.join(language, "model.safetensors"))
    tensors |= {f"model.mm_projector.{name.removeprefix('mlp.')}": value for name, value in projector.items()}
    if inside:
        last = f"encoder.layers.{vision.num_hidden_layers - 1}."
        for name, value in load_file(os.path.join(tower, "model.safetensors")).items():
            name = name.removeprefix("vision_model.")
            if not vision.about.ends_early or not name.startswith(("head.", last)):
                tensors[f"model.vision_tower.vision_tower.{vision.about.level}{name}"] = value
    tensors = {name: value for name, value in tensors.items() if not (drop and name.startswith(drop))}
    tensors |= extra or {}
    written = {
        **text,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": tower,
        "mm_dense_connector_type": connector.dense_connector_type,
        "mm_hidden_size": connector.input_size(vision),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": connector.select_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tokenizer_model_max_length": 2048,
        **config,
    }
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump({key: value for key, value in written.items() if config.get(key, "") is not None}, file)
    cast = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    save_file(cast, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


def all_tensors(reader: TensorReader) -> dict[str, torch.Tensor]:
    return {name: read_tensor(reader, name) for name in reader.names()}


def write_export(export: Export, folder) -> str:
    """Everything of ``export`` in one .safetensors file and the files beside it."""
    os.makedirs(folder)
    for name, content in export.files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    for name, path in export.copies.items():
        shutil.copyfile(path, os.path.join(folder, name))
    save_file(all_tensors(export.tensors), os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    return str(folder)
