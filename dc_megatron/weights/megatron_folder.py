"""A checkpoint of training or import as a ``ModelFolder``: Megatron's tree under Hugging Face's names."""

from __future__ import annotations

import json
import os

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, padded_vocab_size
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.frozen_base import base_folder
from dc_megatron.weights.language_tables import language_table
from dc_megatron.weights.lora_merge import MergedAdapters
from dc_megatron.weights.lora_table import LORA_PREFIX, adapter_shapes
from dc_megatron.weights.model_parts import NEWLINE, PROJECTOR, TOWER, ModelFolder, language_part, tower_part
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.projector_files import projector_shapes
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import Merged, Renamed, TensorReader
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from dc_megatron.weights.tree_tables import CONNECTOR_PREFIX, LANGUAGE_PREFIX
from dc_megatron.weights.views import AsHuggingFace, PlainTensors
from dc_megatron.weights.weight_files import FILES

# What a tree of training holds beside the model.
_NOT_THE_MODEL = ("optimizer.",)


def is_checkpoint(folder: str) -> bool:
    """Whether ``folder`` is one of ours, by training or by import."""
    return os.path.isfile(os.path.join(folder, "hf", checkpoint_folder.DESCRIPTION))


def find_tree(folder: str, step: int | None, flag: str = "--load") -> str:
    """The newest complete tree of ``folder``, or that of ``step``; UserError where there is none."""
    tree = checkpoint_folder.find_tree(folder, step)
    if tree is not None:
        return tree.path
    there = [*checkpoint_folder.iterations(folder)][-1:] if step is None else [step]
    iteration = there[0] if there else None
    path = checkpoint_folder.tree_folder(folder, iteration)
    reason = checkpoint_folder.why_incomplete(folder, iteration) if os.path.isdir(path) else "is not there"
    raise UserError(f"{flag} {folder}: holds no complete checkpoint ({os.path.basename(path)}: {reason})")


def open_checkpoint_folder(
    folder: str, step: int | None = None, vision_tower: str = "", flag: str = "--load", language_model: str = ""
) -> tuple[ModelFolder, str]:
    """(the model, the folder of its tree). ``vision_tower``: where the frozen tower lies now; ``language_model``: where
    the frozen model below adapters does, which are merged into it.

    UserError: nothing complete, a tree of another model, names that are missing or left over.
    """
    described = checkpoint_folder.read_description(folder, flag)
    tree_folder = find_tree(folder, step, flag)
    side = os.path.join(folder, "hf")
    language = LanguageConfig.from_folder(side, flag)
    tree = TorchDistTree(tree_folder, flag)
    what = f"{flag} {tree_folder}"

    plain = PlainTensors(tree)
    adapters, base = None, ""
    if described.lora:
        base = base_folder(described, folder, language_model, flag)
        adapters = _adapters(plain, language, described.lora.r, what)
        text: TensorReader = MergedAdapters(_base(base, language), adapters, described.lora)
        known = {LORA_PREFIX + name for name in adapters.names()}
    else:
        table = language_table(language, padded_vocab_size(language.vocab_size, 1))
        text = AsHuggingFace(tree, table, language.num_hidden_layers, LANGUAGE_PREFIX, what)
        known = text.keys()
    parts: list[TensorReader] = [text]

    connector = None
    if described.mm_dense_connector_type:
        connector = ConnectorConfig(
            described.mm_dense_connector_type, described.mm_projector_type, described.mm_vision_select_layer
        )
    inner = os.path.join(side, "vision_tower")
    inside = not vision_tower and any(os.path.isfile(os.path.join(inner, name)) for name in FILES)
    tower = "" if inside else vision_tower or described.vision_tower
    vision = _vision(side, tower, flag)
    trained = {key for key in plain.names() if key.startswith(TOWER)}
    if trained:
        known |= trained
        parts.append(_trained_tower(plain, trained, vision, connector, inner if inside else tower, what))
    elif inside:
        checkpoint = open_checkpoint(inner, flag)
        parts.append(tower_part(checkpoint, checkpoint.names(), vision, connector, f"{flag} {inner}"))
    names = {key.replace(CONNECTOR_PREFIX + "mlp.", PROJECTOR): key for key in _connector_keys(plain)}
    if names:
        _check_projector(plain, connector, vision, language.hidden_size, what)
        parts.append(Renamed(plain, names))
        known |= set(names.values())
    if described.image_grid_pinpoints and described.merge_type == "spatial_unpad":
        refuse_wrong_names(what, {NEWLINE} - set(plain.names()), (), "hf/ says that rows of patches end with it")
    if NEWLINE in plain.names():
        refuse_wrong_shape(what, NEWLINE, plain.shape(NEWLINE), (language.hidden_size,))
        parts.append(Renamed(plain, {NEWLINE: NEWLINE}))
        known.add(NEWLINE)
    left = [key for key in plain.names() if not key.startswith(_NOT_THE_MODEL) and not _is_known(key, known)]
    refuse_wrong_names(what, (), left, "The tree is of another model, or was written by a newer program")
    model = ModelFolder(
        kind="megatron",
        path=folder,
        language=language,
        reader=Merged(parts),
        config_folder=side,
        language_config=_read_json(os.path.join(side, "config.json")),
        vision=vision,
        connector=connector,
        tower_folder="" if trained else tower,
        tower_config=_read_json(os.path.join(side, "vision_tower", "config.json")),
        processor_config=_read_json(os.path.join(side, "vision_tower", "preprocessor_config.json")),
        version=described.version,
        image_aspect_ratio=described.image_aspect_ratio,
        model_max_length=described.model_max_length,
        image_grid_pinpoints=tuple((width, height) for width, height in described.image_grid_pinpoints or ()) or None,
        mm_patch_merge_type=described.merge_type,
        lora=described.lora,
        adapters=adapters,
        base_folder=base,
    )
    return model, tree_folder


def _trained_tower(
    plain: PlainTensors, names: set[str], vision: VisionConfig | None, connector: ConnectorConfig, tower: str, what: str
) -> TensorReader:
    """The tower as it was trained, and what no connector reads of it as it was published, where that is at hand."""
    if vision is None:
        raise UserError(f"{what}: holds a vision tower, but hf/ does not say of which shape; give --vision-tower")
    trained = tower_part(plain, names, vision, connector, what)
    if not os.path.isdir(tower):
        return trained
    checkpoint = open_checkpoint(tower, "--vision-tower")
    whole = tower_part(checkpoint, checkpoint.names(), vision, connector, f"--vision-tower {tower}")
    rest = {name: name for name in whole.names() if name not in set(trained.names())}
    return Merged([trained, Renamed(whole, rest)])


def _adapters(plain: PlainTensors, language: LanguageConfig, r: int, what: str) -> TensorReader:
    """The tree's factors under Hugging Face's names."""
    shapes = adapter_shapes(language, r)
    found = {name.removeprefix(LORA_PREFIX) for name in plain.names() if name.startswith(LORA_PREFIX)}
    refuse_wrong_names(what, shapes.keys() - found, found - shapes.keys(), "The tree is of another model")
    for name, shape in shapes.items():
        refuse_wrong_shape(what, name, plain.shape(LORA_PREFIX + name), shape)
    return Renamed(plain, {name: LORA_PREFIX + name for name in shapes})


def _base(folder: str, language: LanguageConfig) -> TensorReader:
    checkpoint = open_checkpoint(folder, "--model_name_or_path")
    names = {name: name for name in checkpoint.names()}
    return language_part(checkpoint, names, language, f"--model_name_or_path {folder}")


def _connector_keys(plain: PlainTensors) -> list[str]:
    return [key for key in plain.names() if key.startswith(CONNECTOR_PREFIX)]


def _is_known(key: str, known: set[str]) -> bool:
    """Stacked and per-layer spellings of a known key with ``{layer}``."""
    if key in known or key.replace("decoder.layers.", "decoder.layers.{layer}.") in known:
        return True
    head, mark, rest = key.partition("decoder.layers.")
    number, _, name = rest.partition(".")
    return bool(mark) and number.isdigit() and f"{head}{mark}{{layer}}.{name}" in known


def _vision(side: str, tower: str, flag: str) -> VisionConfig | None:
    """The tower's shape, from the copy in the checkpoint or from the tower itself."""
    for folder in (os.path.join(side, "vision_tower"), tower):
        if folder and os.path.isfile(os.path.join(folder, "config.json")):
            return VisionConfig.from_folder(folder, flag)
    return None


def _check_projector(plain: PlainTensors, connector, vision, hidden_size: int, what: str) -> None:
    if connector is None or vision is None:
        raise UserError(
            f"{what}: holds a connector, but hf/ does not say of which type or tower; give the tower: --vision-tower"
        )
    expected = {
        CONNECTOR_PREFIX + name: shape for name, shape in projector_shapes(connector, vision, hidden_size).items()
    }
    found = set(_connector_keys(plain))
    refuse_wrong_names(what, expected.keys() - found, found - expected.keys(), "The tree is of another model")
    for key, shape in expected.items():
        if plain.shape(key) != shape:
            raise UserError(f"{what}: {key} has shape {list(plain.shape(key))}, not {list(shape)} as hf/ says")


def _read_json(path: str) -> dict | None:
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
