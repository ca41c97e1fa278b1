"""A model as it lies on disk, whatever the format: its shapes, its tensors under one set of names, its side files.

The names that all formats are mapped to:

    model.embed_tokens.weight, model.layers.N.*, lm_head.weight   the language model, as transformers' text models
    mm_projector.{0,2}.{weight,bias}                              the projector
    image_newline                                                 spatial_unpad: the vector that ends a row of patches
    vision_tower.*                                                the tower, as in ``vision_tables``
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dc_megatron.config import ConnectorConfig, LanguageConfig, VisionConfig, layer_table, read_json_file, tower_family
from dc_megatron.errors import UserError
from dc_megatron.weights.derived_tensors import equal_tensors
from dc_megatron.weights.language_tables import EMBEDDING, HEAD, IGNORED_NAMES, hugging_face_shapes, language_table
from dc_megatron.weights.names import refuse_wrong_names, refuse_wrong_shape
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import InMemory, Merged, Renamed, TensorReader
from dc_megatron.weights.vision_tables import tower_names

PROJECTOR = "mm_projector."
TOWER = "vision_tower."
NEWLINE = "image_newline"
PROJECTOR_PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")


@dataclass(frozen=True)
class ModelFolder:
    """``kind``: hf | llava | hf-llava | hf-llava-next | megatron.

    ``vision`` and ``connector`` are None for a language model alone. Where ``connector`` is None beside a tower,
    nobody has said yet which it will be.
    """

    kind: str
    path: str
    language: LanguageConfig
    reader: TensorReader
    # Where the tokenizer's files lie.
    config_folder: str
    # The content of config.json for the language model alone.
    language_config: dict
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None
    # Folder with the frozen tower's weights, or "" where they are in ``reader`` or there is no tower.
    tower_folder: str = ""
    # What the source calls the tower, such as a hub's name; "" where it says nothing.
    tower_name: str = ""
    # Contents of config.json (a vision model's) and preprocessor_config.json.
    tower_config: dict | None = None
    processor_config: dict | None = None
    version: str = ""
    image_aspect_ratio: str = ""
    model_max_length: int | None = None
    # AnyRes: resolutions as LLaVA writes them, (width, height).
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None = None
    # AnyRes: how tiles are joined, flat | spatial | spatial_unpad; the last has the tensor image_newline.
    mm_patch_merge_type: str = "flat"
    # The id of a picture's placeholder where the source has one.
    image_token_id: int | None = None

    @property
    def has_projector(self) -> bool:
        return f"{PROJECTOR}0.weight" in self.reader.names()

    @property
    def has_tower(self) -> bool:
        """Whether the tower's weights are among the model's own."""
        return any(name.startswith(TOWER) for name in self.reader.names())

    @property
    def carries_tower(self) -> bool:
        """Whether the tower belongs to the model: among its tensors, or in a folder inside its own."""
        if self.has_tower or not self.tower_folder:
            return self.has_tower
        root, tower = os.path.realpath(self.path), os.path.realpath(self.tower_folder)
        return os.path.commonpath([root, tower]) == root

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.dtype(EMBEDDING)


def language_part(reader: TensorReader, names: dict[str, str], language: LanguageConfig, what: str) -> Renamed:
    """The language model's tensors; ``names`` maps each text name to its name in ``reader``.

    UserError that begins with ``what``: names missing or left over, wrong shapes, a tied head that is another tensor.
    """
    names = {name: place for name, place in names.items() if not IGNORED_NAMES.fullmatch(name)}
    expected = hugging_face_shapes(language_table(language, language.vocab_size), language.num_hidden_layers)
    optional = {HEAD} if language.tie_word_embeddings else set()
    refuse_wrong_names(
        what,
        expected.keys() - names.keys(),
        names.keys() - expected.keys() - optional,
        "config.json and weights are of different models, or the folder is incomplete",
    )
    for name, shape in expected.items():
        refuse_wrong_shape(what, names[name], reader.shape(names[name]), shape)
    if HEAD in names and language.tie_word_embeddings:
        if not equal_tensors(reader, names[HEAD], names[EMBEDDING]):
            raise UserError(
                f"{what}: config.json says tie_word_embeddings true, but {names[HEAD]} differs from"
                f" {names[EMBEDDING]}; set tie_word_embeddings to false in config.json, or remove the head"
            )
        del names[HEAD]
    return Renamed(reader, names)


def projector_part(
    reader: TensorReader, names: dict[str, str], vision: VisionConfig, connector: ConnectorConfig, width: int, what: str
) -> Renamed:
    """The projector's tensors; ``names`` maps ``mm_projector.*`` to names in ``reader``, ``width``: the text model's.

    UserError that begins with ``what``: parts missing or left over, shapes of another connector.
    """
    shapes = {
        "0.weight": (width, connector.input_size(vision)),
        "0.bias": (width,),
        "2.weight": (width, width),
        "2.bias": (width,),
    }
    refuse_wrong_names(
        what,
        {PROJECTOR + part for part in shapes} - names.keys(),
        [names[name] for name in names.keys() - {PROJECTOR + part for part in shapes}],
        "A projector of type mlp2x_gelu holds two linear layers and no more",
    )
    for part, shape in shapes.items():
        found = reader.shape(names[PROJECTOR + part])
        if found != shape:
            raise UserError(
                f"{what}: {names[PROJECTOR + part]} has shape {list(found)}; a {connector.dense_connector_type}"
                f" connector from a tower of width {vision.hidden_size} to a language model of width {width} has"
                f" {list(shape)}: config.json and weights are of different connectors"
            )
    return Renamed(reader, names)


def tower_part(
    reader: TensorReader, names: Iterable[str], vision: VisionConfig, connector: ConnectorConfig | None, what: str
) -> Renamed:
    """The tower's tensors as ``vision_tower.*``, found among ``names`` of ``reader``; checked as ``tower_names``."""
    found = tower_names(reader, list(names), vision, connector, what)
    return Renamed(reader, {TOWER + key: name for key, name in found.items()})


def refuse_lost_grid(model: ModelFolder, format: str) -> None:
    """UserError for an AnyRes model whose resolutions nobody knows: it would be read as another."""
    if model.image_aspect_ratio == "anyres" and model.image_grid_pinpoints is None:
        raise UserError(
            f"--format {format}: {model.path} is an AnyRes model, but its image_grid_pinpoints are not known; export"
            " the folder that it was imported from"
        )


def tower_of(model: ModelFolder, flag: str = "--vision-tower") -> TensorReader:
    """The tower's tensors as ``vision_tower.*``, out of the model's own or of the folder where they lie."""
    assert model.vision is not None, "the model has no tower"
    if model.has_tower:
        return Renamed(model.reader, {name: name for name in model.reader.names() if name.startswith(TOWER)})
    checkpoint = open_checkpoint(model.tower_folder, flag)
    what = f"{flag} {model.tower_folder}"
    return tower_part(checkpoint, checkpoint.names(), model.vision, model.connector, what)


def complete_tower(tower: TensorReader, vision: VisionConfig, connector: ConnectorConfig) -> tuple[TensorReader, int]:
    """The tower as a whole number of layers with its last norm, and that number, for readers that want no gaps.

    Layers that no connector reads may be missing at the end: the tower then ends where they begin. The norm behind
    the last layer is used by no connector either; where it is missing it becomes the identity's.
    """
    names = set(tower.names())
    layers = vision.num_hidden_layers
    if not any(_above(name, vision.about.blocks, layers - 1) for name in names):
        layers = layer_table(vision, connector).deepest
    kept = {name: name for name in names if not _above(name, vision.about.blocks, layers)}
    parts: list[TensorReader] = [Renamed(tower, kept)]
    if f"{TOWER}post_layernorm.weight" not in names:
        dtype = tower.dtype(f"{TOWER}embeddings.patch_embedding.weight")
        width = vision.hidden_size
        norm = {"weight": torch.ones(width, dtype=dtype), "bias": torch.zeros(width, dtype=dtype)}
        parts.append(InMemory({f"{TOWER}post_layernorm.{part}": value for part, value in norm.items()}))
    return Merged(parts), layers


def _above(name: str, blocks: str, layers: int) -> bool:
    """Whether ``name`` belongs to a layer of the tower from number ``layers`` on."""
    start = f"{TOWER}{blocks}."
    return name.startswith(start) and int(name.removeprefix(start).split(".")[0]) >= layers


def read_tower_config(folder: str, flag: str) -> tuple[dict, dict | None]:
    """(config.json of the tower alone, preprocessor_config.json or None) of a tower's folder, whole or not."""
    what = f"{flag} {folder}"
    config = read_json_file(folder, "config.json", what)
    if "vision_config" in config:
        family = tower_family(config.get("model_type"))
        config = {**config["vision_config"], "model_type": family.model_type if family else ""}
    processor = None
    if os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
        processor = read_json_file(folder, "preprocessor_config.json", what)
    return config, processor
