"""A folder of any kind as something that gives logits: what it is made of, known from headers, and how it is run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dc_megatron.config import VisionConfig, image_tokens, read_json_file
from dc_megatron.errors import UserError
from dc_megatron.evaluation.logit_inputs import LogitInput
from dc_megatron.weights.exporter import open_any
from dc_megatron.weights.hf_llava_format import HF_LLAVA_TYPES
from dc_megatron.weights.megatron_folder import is_checkpoint
from dc_megatron.weights.model_parts import NEWLINE, PROJECTOR, TOWER, ModelFolder, tower_of
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.sti_modeling import MODEL_TYPE as STI_TYPE
from dc_megatron.weights.sti_modeling import MODELING_FILE
from dc_megatron.weights.tensor_reader import TensorReader

# Computes fp32 logits [positions that are no picture, common vocabulary] of every input, on the CPU.
Compute = Callable[[list[LogitInput], int], list[Tensor]]

_TILES = "divides pictures into tiles (anyres), for which there is no plain model here"


@dataclass(frozen=True)
class Side:
    """One of the two folders. ``what`` begins messages about it.

    ``no_picture`` says why it is not shown a picture, "" where it can be. ``dtypes``: as stored, of the words' part and
    of the whole. ``folded``: the connector's means are part of its projector.
    """

    what: str
    vocab_size: int
    special_ids: frozenset[int]
    parameters: int
    dtypes: tuple[frozenset[torch.dtype], frozenset[torch.dtype]]
    compute: Compute
    no_picture: str = ""
    vision: VisionConfig | None = None
    tokens: int = 0
    folded: bool = False


def open_side(folder: str, flag: str, step: int | None, vision_tower: str) -> Side:
    """``folder``, of a kind that its files say. UserError: as ``open_any``; code in the folder."""
    what = f"{flag} {folder}"
    if not is_checkpoint(folder):
        config = read_json_file(folder, "config.json", what)
        if config.get("model_type") == STI_TYPE:
            raise UserError(
                f"{what}: --logits does not run it: its {MODELING_FILE} is code in the folder, and no folder's code is"
                " run here; compare logits with what --format llava exports, or leave --logits out to compare bits"
            )
        if config.get("model_type") in HF_LLAVA_TYPES and "mm_vision_tower" not in config:
            return _stock_side(folder, what, flag, config)
        if "mm_vision_tower" not in config:
            vision_tower = ""
        step = None
    model, tree = open_any(folder, step, vision_tower, flag)
    return _side(model, tree, what)


def _side(model: ModelFolder, tree: str, what: str) -> Side:
    model = replace(model, tower_folder=_tower_folder(model))
    no_picture, readers = _no_picture(model, what), [model.reader]
    if not no_picture and not model.has_tower and os.path.isdir(model.tower_folder):
        readers.append(tower_of(model))
    text = [
        model.reader.dtype(name) for name in model.reader.names() if not name.startswith((TOWER, PROJECTOR, NEWLINE))
    ]
    return Side(
        what=what,
        vocab_size=model.language.vocab_size,
        special_ids=_special_ids(model.language_config),
        parameters=sum(_elements(reader) for reader in readers),
        dtypes=(frozenset(text), _dtypes(readers)),
        compute=_compute(model, tree, what),
        no_picture=no_picture,
        vision=model.vision,
        tokens=0 if no_picture else image_tokens(model.vision, model.connector),
    )


def _compute(model: ModelFolder, tree: str, what: str) -> Compute:
    # Each imports much; a comparison needs two of them at most.
    if model.kind == "megatron":
        from dc_megatron.evaluation.megatron_logits import in_a_process_of_its_own

        return lambda inputs, columns: in_a_process_of_its_own(model, tree, what, inputs, columns)
    from dc_megatron.evaluation import plain_logits

    if model.kind == "llava":
        return lambda inputs, columns: plain_logits.of_llava(model, inputs, columns)
    return lambda inputs, columns: plain_logits.of_text_model(model.path, what, inputs, columns)


def _no_picture(model: ModelFolder, what: str) -> str:
    if not model.has_projector:
        return f"{what} has no projector"
    if model.image_grid_pinpoints is not None or NEWLINE in model.reader.names():
        return f"{what} {_TILES}"
    return ""


def _tower_folder(model: ModelFolder) -> str:
    """Where the tower lies; the copy in the checkpoint where the folder was moved after its conversion."""
    carried = os.path.join(model.path, "hf", "vision_tower")
    moved = model.kind == "megatron" and not os.path.isdir(model.tower_folder)
    return carried if moved and os.path.isfile(f"{carried}/model.safetensors") else model.tower_folder


def _stock_side(folder: str, what: str, flag: str, config: dict) -> Side:
    """A folder that transformers' own Llava runs; opened by its configuration, as DCI's layers are no connector's."""
    from transformers import AutoConfig

    from dc_megatron.evaluation import plain_logits

    complete = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    reader = open_checkpoint(folder, flag)
    text, image_token = complete.text_config, plain_logits.image_token(complete)
    vision = VisionConfig.from_config(complete.vision_config.to_dict(), what)
    layers, language = complete.vision_feature_layer, [n for n in reader.names() if "language_model" in n]
    with_class = complete.vision_feature_select_strategy == "full" and vision.num_prefix_tokens
    return Side(
        what=what,
        vocab_size=text.vocab_size,
        special_ids=_special_ids(text.to_dict()) | {image_token},
        parameters=_elements(reader),
        dtypes=(frozenset(reader.dtype(name) for name in language), _dtypes([reader])),
        compute=lambda inputs, columns: plain_logits.of_stock_llava(folder, what, inputs, columns),
        no_picture=f"{what} {_TILES}" if config["model_type"] == "llava_next" else "",
        vision=vision,
        tokens=vision.num_patches + int(with_class),
        folded=not isinstance(layers, int),
    )


def _special_ids(config: dict) -> frozenset[int]:
    found = [config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")]
    return frozenset(i for value in found if value is not None for i in (value if isinstance(value, list) else [value]))


def _elements(reader: TensorReader) -> int:
    return sum(math.prod(reader.shape(name)) for name in reader.names())


def _dtypes(readers: list[TensorReader]) -> frozenset[torch.dtype]:
    return frozenset(reader.dtype(name) for reader in readers for name in reader.names())
