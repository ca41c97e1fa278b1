"""LLaVA's and DenseConnector's own folders: one config.json for the language model and everything around it.

model.layers.N.*, lm_head.weight, ...               the language model under its usual names
model.mm_projector.{0,2}.{weight,bias}
model.image_newline                                 AnyRes
model.vision_tower.vision_tower.vision_model.*      the tower, where it was trained along (SigLIP: no last layer)
"""

from __future__ import annotations

import ast
import os
import re

import torch

from dc_megatron.config import MERGE_TYPES, ConnectorConfig, LanguageConfig, VisionConfig, layer_table, one_of
from dc_megatron.errors import UserError
from dc_megatron.weights.export_plan import TEXT_ARCHITECTURES, Export, json_bytes, portable_text_config
from dc_megatron.weights.model_parts import (
    NEWLINE,
    PROJECTOR,
    TOWER,
    ModelFolder,
    language_part,
    projector_part,
    read_tower_config,
    refuse_lost_grid,
    tower_of,
    tower_part,
)
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.public_towers import PUBLIC_TOWERS, public_tower_name
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import Merged, Renamed
from dc_megatron.weights.weight_files import tokenizer_files

_PROJECTOR = "model.mm_projector."
_NEWLINE = "model.image_newline"
_TOWER = "model.vision_tower."
_INNER_TOWER = "model.vision_tower.vision_tower."

# Entries of config.json that are not the language model's.
_OURS = re.compile(
    r"mm_.*|image_.*|use_mm_proj|(un)?freeze_mm_.*|tune_mm_.*|tokenizer_.*|is_video|if_pool|vision_tower.*"
    # A limit for generation in some published folders; no property of the model.
    r"|max_length|max_sequence_length"
)
# Language model -> (model_type, architecture) of the programs of LLaVA's family, and back.
_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "qwen3": ("llava_qwen3", "LlavaQwen3ForCausalLM"),
    "phi": ("llava_phi", "LlavaPhiForCausalLM"),
}
_ASPECT_RATIOS = ("square", "pad", "anyres")
# The layers that the original's program reads whatever the tower (dc/model/multimodal_projector/dense_connector.py).
_ORIGINAL_DEPTH = {"clip": 24, "siglip": 27}


def open_llava(folder: str, config: dict, flag: str, vision_tower: str = "") -> ModelFolder:
    """``folder``, whose config.json is ``config``, with its tower from ``vision_tower``, from inside, or by name.

    UserError as ``open_model``, and for what the format can say and this program cannot do.
    """
    what = f"{flag} {folder}"
    text = _text_config(config, what)
    language = LanguageConfig.from_config(text, what, folder)
    connector = _connector(config, what)
    checkpoint = open_checkpoint(folder, flag)
    names = checkpoint.names()
    inside = [name for name in names if name.startswith(_TOWER)]
    tower_folder, tower_config, processor = _tower(folder, config, vision_tower, bool(inside), what)
    vision = VisionConfig.from_config(tower_config, what, processor, tower_folder)
    grid, merge = _grid(config, vision, connector, what)

    own = {name for name in names if name.startswith(_PROJECTOR)}
    rest = {name: name for name in names if name not in own and name not in inside and name != _NEWLINE}
    parts = [
        language_part(checkpoint, rest, language, what),
        projector_part(
            checkpoint,
            {PROJECTOR + name.removeprefix(_PROJECTOR): name for name in own},
            vision,
            connector,
            language.hidden_size,
            what,
        ),
    ]
    if inside:
        parts.append(tower_part(checkpoint, inside, vision, connector, what))
    if _NEWLINE in names:
        refuse_wrong_shape(what, _NEWLINE, checkpoint.shape(_NEWLINE), (language.hidden_size,))
        parts.append(Renamed(checkpoint, {NEWLINE: _NEWLINE}))
    elif merge == "spatial_unpad":
        refuse_wrong_names(what, [_NEWLINE], [], "config.json says that rows of patches end with it")
    return ModelFolder(
        kind="llava",
        path=folder,
        language=language,
        reader=Merged(parts),
        config_folder=folder,
        language_config=text,
        vision=vision,
        connector=connector,
        tower_folder="" if inside else tower_folder,
        tower_name=config["mm_vision_tower"] or "",
        tower_config=tower_config,
        processor_config=processor,
        image_aspect_ratio=config.get("image_aspect_ratio") or "square",
        model_max_length=config.get("tokenizer_model_max_length"),
        image_grid_pinpoints=grid,
        mm_patch_merge_type=merge,
    )


def _text_config(config: dict, what: str) -> dict:
    """The language model's part of ``config``, as a configuration of its own."""
    families = {name: family for family, names in _TYPES.items() for name in (family, *names)}
    architectures = config.get("architectures") or []
    said = [config.get("model_type"), *architectures] if config.get("model_type") != "llava" else architectures
    family = next((families[name] for name in said if name in families), None)
    if family is None and config.get("model_type") == "llava" and not architectures:
        family = "llama"
    if family is None:
        raise UserError(
            f"{what}: a LLaVA folder over model_type '{config.get('model_type')}' ({', '.join(architectures)});"
            f" available: {', '.join(_TYPES)}"
        )
    text = {key: value for key, value in config.items() if not _OURS.fullmatch(key)}
    return {**text, "model_type": family, "architectures": [TEXT_ARCHITECTURES[family]]}


def _connector(config: dict, what: str) -> ConnectorConfig:
    projector = config.get("mm_projector_type") or "linear"
    if projector != "mlp2x_gelu":
        raise UserError(f"{what}: mm_projector_type '{projector}' is not available; mlp2x_gelu is")
    if config.get("mm_use_im_start_end"):
        raise UserError(
            f"{what}: mm_use_im_start_end: pictures between two tokens of their own are not available; LLaVA 1.5 and"
            " later, and DenseConnector, do without"
        )
    kind = str(config.get("mm_dense_connector_type") or "none").lower()
    one_of(kind, ("sti", "sci", "dci", "none"), f"{what}: mm_dense_connector_type")
    return ConnectorConfig(kind, projector, config.get("mm_vision_select_layer", -2))


def _tower(folder: str, config: dict, vision_tower: str, inside: bool, what: str) -> tuple[str, dict, dict | None]:
    """(folder of the tower or "", its configuration, its processor's)."""
    name = config["mm_vision_tower"] or ""
    if not isinstance(name, str):
        raise UserError(f"{what}: mm_vision_tower {name!r} is no name of a tower; give its folder with --vision-tower")
    places = [vision_tower] if vision_tower else [name, os.path.join(folder, name)] if name else []
    place = next((place for place in places if os.path.isdir(place)), "")
    if place or vision_tower:
        return place, *read_tower_config(place or vision_tower, "--vision-tower")
    public = PUBLIC_TOWERS.get(name.split("/")[-1])
    if inside and public:
        return "", *(dict(part) for part in public)
    carried = "carries the tower's weights, but not its configuration" if inside else "does not carry it"
    known = f"was trained with the tower '{name}'" if name else "does not name the tower it was trained with"
    raise UserError(f"{what}: {known} and {carried}; give its folder with --vision-tower")


def _grid(config: dict, vision: VisionConfig, connector: ConnectorConfig, what: str) -> tuple[tuple | None, str]:
    """AnyRes: the resolutions as (width, height) or None, and how tiles are joined ("flat" without AnyRes).

    What is said of patches and cannot be kept is refused.
    """
    if vision.num_prefix_tokens and (config.get("mm_vision_select_feature") or "patch") != "patch":
        raise UserError(
            f"{what}: mm_vision_select_feature '{config['mm_vision_select_feature']}' is not available; patch is"
        )
    aspect = config.get("image_aspect_ratio") or "square"
    one_of(aspect, _ASPECT_RATIOS, f"{what}: image_aspect_ratio")
    if aspect != "anyres":
        # The original then reads no mm_patch_merge_type, whatever it says.
        return None, "flat"
    merge = config.get("mm_patch_merge_type") or "flat"
    one_of(merge, MERGE_TYPES, f"{what}: mm_patch_merge_type")
    if connector.dense_connector_type == "sti" and merge != "flat":
        raise UserError(
            f"{what}: mm_patch_merge_type {merge}: an sti connector adds pooled tokens that have no place in a grid of"
            " patches"
        )
    pinpoints = config.get("image_grid_pinpoints")
    try:
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        grid = tuple((int(width), int(height)) for width, height in pinpoints)
    except (ValueError, TypeError, SyntaxError):
        raise UserError(f"{what}: image_grid_pinpoints {pinpoints!r} is no list of resolutions") from None
    if not grid or any(side <= 0 or side % vision.image_size for size in grid for side in size):
        raise UserError(
            f"{what}: image_grid_pinpoints {pinpoints} are no multiples of the tower's {vision.image_size} pixels"
        )
    return grid, merge


def llava_export(model: ModelFolder, *, vision_tower_name: str = "", dtype: torch.dtype | None = None) -> Export:
    """``model`` as a LLaVA / DenseConnector folder.

    ``vision_tower_name`` is written as ``mm_vision_tower`` ("": what the source called it, else its folder); ``dtype``
    is what the writer will cast to, None as stored. The tower's weights go along only where the model carries them.
    UserError: a model without projector, an AnyRes model that has lost its resolutions.
    """
    if not model.has_projector:
        raise UserError("--format llava: the model has no projector; --format hf writes the language model")
    refuse_lost_grid(model, "llava")
    reader = model.reader
    if model.carries_tower and not model.has_tower:
        reader = Merged([reader, tower_of(model)])
    name, files = _tower_name(model, vision_tower_name)
    config = _config(model, name, dtype or model.dtype)
    files = {"config.json": json_bytes(config), **files}
    tensors = Renamed(reader, _names(reader.names(), model.vision))
    return Export(tensors, files, tokenizer_files(model.config_folder), config, _notes(model, config))


def _tower_name(model: ModelFolder, given: str) -> tuple[str, dict[str, bytes]]:
    """(mm_vision_tower, files that it asks for): a tower inside that nobody knows by name brings its configuration."""
    name = given or model.tower_name
    if name or not model.carries_tower:
        return name or model.tower_folder, {}
    public = public_tower_name(model.vision)
    if public:
        return public, {}
    folder = f"{model.vision.family}_vision_tower"
    files = {f"{folder}/config.json": json_bytes(model.tower_config)}
    if model.processor_config:
        files[f"{folder}/preprocessor_config.json"] = json_bytes(model.processor_config)
    return folder, files


def _names(own: list[str], vision: VisionConfig) -> dict[str, str]:
    """Name in LLaVA's files -> our name."""
    last = f"{TOWER}{vision.about.blocks}.{vision.num_hidden_layers - 1}."
    names = {}
    for name in own:
        if name.startswith(PROJECTOR):
            names[_PROJECTOR + name.removeprefix(PROJECTOR)] = name
        elif name == NEWLINE:
            names[_NEWLINE] = name
        elif not name.startswith(TOWER):
            names[name] = name
        # The original cuts SigLIP's last layer off.
        elif not vision.about.ends_early or not name.startswith(last):
            names[_INNER_TOWER + vision.about.level + name.removeprefix(TOWER)] = name
    return names


def _config(model: ModelFolder, tower_name: str, dtype: torch.dtype) -> dict:
    connector, vision = model.connector, model.vision
    model_type, architecture = _TYPES[model.language.model_type]
    anyres = model.image_grid_pinpoints is not None
    config = {
        **portable_text_config(model.language_config, dtype),
        "model_type": model_type,
        "architectures": [architecture],
        "mm_vision_tower": tower_name,
        "mm_dense_connector_type": connector.dense_connector_type,
        "mm_hidden_size": connector.input_size(vision),
        "mm_projector_type": connector.projector_type,
        "mm_vision_select_layer": connector.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": _merge_type(model),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        # Programs of LLaVA's family load a tower from inside only where this is true.
        "unfreeze_mm_vision_tower": model.carries_tower,
        "image_aspect_ratio": model.image_aspect_ratio or "pad",
        "tokenizer_padding_side": "right",
    }
    if model.model_max_length:
        config["tokenizer_model_max_length"] = model.model_max_length
    if anyres:
        config["image_grid_pinpoints"] = [list(size) for size in model.image_grid_pinpoints]
    return config


def _merge_type(model: ModelFolder) -> str:
    """Without AnyRes nothing is joined; it then still says whether there is an image_newline."""
    if model.image_grid_pinpoints is not None:
        return model.mm_patch_merge_type
    return "spatial_unpad" if NEWLINE in model.reader.names() else "flat"


def _notes(model: ModelFolder, config: dict) -> list[str]:
    vision, name = model.vision, config["mm_vision_tower"]
    notes = ["the original's program wants 'llava' in the name of the folder"]
    if vision.family in _ORIGINAL_DEPTH and vision.family not in os.path.basename(os.path.normpath(name)).lower():
        notes.append(
            f"the original's program tells the tower by its name: '{name}' would have to contain '{vision.family}'"
        )
    kind, depth = model.connector.dense_connector_type, vision.num_hidden_layers
    if vision.family not in _ORIGINAL_DEPTH:
        notes.append(f"the original's program knows CLIP and SigLIP; this tower is of the family {vision.family}")
    elif kind != "none" and depth != _ORIGINAL_DEPTH[vision.family]:
        table = layer_table(vision, model.connector)
        notes.append(
            f"the original's program reads the layers of a tower of {_ORIGINAL_DEPTH[vision.family]}; this one has"
            f" {depth} and was trained with layers {[list(group) for group in table.groups]}"
        )
    if model.language.model_type != "llama":
        notes.append(
            f"DenseConnector's program knows Llama only; {config['architectures'][0]} is in other programs of LLaVA's"
            " family"
        )
    if model.carries_tower:
        notes.append(
            "the tower's weights are inside: DenseConnector's program reads them from mm_vision_tower instead; others"
            " of LLaVA's family take them from here"
        )
    return notes
