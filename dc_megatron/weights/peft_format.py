"""Adapters as LLaVA saves them: a PEFT folder, with config.json and what was trained besides in a file of its own.

adapter_config.json adapter_model.safetensors   for peft.PeftModel.from_pretrained
non_lora_trainables.bin                         the projector (and image_newline) under PEFT's names
config.json                                     LLaVA's, of the whole model
"""

from __future__ import annotations

import io

import torch

from dc_megatron.errors import UserError
from dc_megatron.weights.export_plan import Export, json_bytes
from dc_megatron.weights.llava_format import llava_export
from dc_megatron.weights.model_parts import NEWLINE, PROJECTOR, ModelFolder
from dc_megatron.weights.peft_files import CONFIG, NON_LORA, PEFT_PREFIX, WEIGHTS, peft_config
from dc_megatron.weights.tensor_reader import Renamed, read_tensor


def peft_export(model: ModelFolder, *, vision_tower_name: str = "", dtype: torch.dtype | None = None) -> Export:
    """The adapters of ``model``; ``vision_tower_name`` and ``dtype`` as for ``llava_export``.

    UserError: a model without adapters.
    """
    if model.adapters is None:
        raise UserError(f"--format peft: {model.path} holds no adapters; hf, llava and hf-llava write whole models")
    config = llava_export(model, vision_tower_name=vision_tower_name, dtype=dtype).config
    names = {PEFT_PREFIX + name: name for name in model.adapters.names()}
    files = {
        CONFIG: json_bytes(peft_config(model.language, model.lora, model.base_folder)),
        "config.json": json_bytes(config),
        NON_LORA: _trained_besides(model, dtype),
    }
    notes = [
        f"adapters to {model.base_folder}: peft.PeftModel.from_pretrained reads them; LLaVA's programs want that folder"
        " as --model-base, and 'llava' and 'lora' in the name of this one"
    ]
    return Export(Renamed(model.adapters, names), files, {}, config, notes, one_file=WEIGHTS)


def _trained_besides(model: ModelFolder, dtype: torch.dtype | None) -> bytes:
    """``non_lora_trainables.bin``: small enough to be made in memory."""
    tensors = {}
    for name in model.reader.names():
        if name.startswith(PROJECTOR) or name == NEWLINE:
            tensor = read_tensor(model.reader, name)
            tensors[f"{PEFT_PREFIX}model.{name}"] = tensor if dtype is None else tensor.to(dtype)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
