"""Open any Hugging Face, LLaVA or llava-hf folder as a ``ModelFolder``; its config.json says which it is."""

from __future__ import annotations

import os
from dataclasses import replace

from dc_megatron.config import CONNECTOR_TYPES, ConnectorConfig, LanguageConfig, VisionConfig, one_of, read_json_file
from dc_megatron.errors import UserError
from dc_megatron.weights.checkpoint_folder import DESCRIPTION
from dc_megatron.weights.derived_tensors import ColumnBlocks
from dc_megatron.weights.hf_llava_format import HF_LLAVA_TYPES, open_hf_llava
from dc_megatron.weights.llava_format import open_llava
from dc_megatron.weights.manifest import MANIFEST
from dc_megatron.weights.model_parts import PROJECTOR, ModelFolder, language_part, read_tower_config, tower_of
from dc_megatron.weights.projector_files import read_projector, recorded_connector
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import InMemory, Merged, Renamed
from dc_megatron.weights.weight_files import FILES

__all__ = ["ModelFolder", "open_model"]

_ADAPTER_FILES = ("adapter_config.json", "non_lora_trainables.bin")
_PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")


def open_model(
    folder: str,
    flag: str = "--hf",
    *,
    vision_tower: str = "",
    projector: str = "",
    dense_connector_type: str = "",
    select_layer: int = -2,
) -> ModelFolder:
    """The model in ``folder``, every name and shape of its weights checked; nothing but headers is read.

    ``vision_tower``: the tower's folder, where the model does not carry its tower. ``projector``: a file or
    folder, for a language model alone. ``dense_connector_type``: for such a projector or one that comes later; and
    ``sci`` or ``dci`` over a model that reads one layer, whose projector is then widened with zeros, so that it
    computes the same. ``select_layer`` is asked for where no file says it. UserError: what the folder is and what to
    do instead, names missing or left over, shapes of another model, contradictions.
    """
    what = f"{flag} {folder}"
    if dense_connector_type:
        one_of(dense_connector_type, CONNECTOR_TYPES, "--mm_dense_connector_type")
    _refuse_parts_of_models(folder, what)
    config = read_json_file(folder, "config.json", what)
    if "mm_vision_tower" in config:
        model = open_llava(folder, config, flag, vision_tower)
    elif config.get("model_type") in HF_LLAVA_TYPES:
        model = open_hf_llava(folder, config, flag, vision_tower)
    else:
        return _open_text(folder, config, flag, vision_tower, projector, dense_connector_type, select_layer)
    if model.tower_folder:
        # Opening checks its names and shapes.
        tower_of(model)
    if projector:
        raise UserError(f"--projector {projector}: {folder} has a projector of its own; leave the flag out")
    return _with_connector_type(model, dense_connector_type, what) if dense_connector_type else model


def _refuse_parts_of_models(folder: str, what: str) -> None:
    """Checkpoints of ours, and folders of LLaVA that hold a part of a model: adapters, or the projector of stage 1."""
    if os.path.isfile(os.path.join(folder, "hf", DESCRIPTION)):
        raise UserError(f"{what}: is a checkpoint of this program already; train with --load, or export it")
    if os.path.isfile(os.path.join(folder, MANIFEST)) and os.path.isfile(os.path.join(folder, ".metadata")):
        parent = os.path.dirname(os.path.abspath(folder))
        raise UserError(f"{what}: is one iteration of a checkpoint; give the folder that it lies in, {parent}")
    present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    adapter = next((name for name in _ADAPTER_FILES if name in present), None)
    if adapter:
        raise UserError(
            f"{what}: has {adapter}: these are adapters over another model; merge them into it first (LLaVA's"
            " scripts/merge_lora_weights.py, or peft's merge_and_unload) and give the merged folder"
        )
    projector = next((name for name in _PROJECTOR_FILES if name in present), None)
    if projector and not present.intersection(FILES):
        raise UserError(
            f"{what}: holds a projector alone ({projector}), the result of stage 1; give the language model it was"
            f" trained with, and the projector as --projector {os.path.join(folder, projector)}"
        )


def _open_text(
    folder: str, config: dict, flag: str, vision_tower: str, projector: str, kind: str, select_layer: int
) -> ModelFolder:
    """A language model alone, perhaps with a tower and a projector beside it."""
    what = f"{flag} {folder}"
    try:
        language = LanguageConfig.from_config(config, what, folder)
    except UserError as error:
        if "model_type" not in str(error):
            raise
        raise UserError(
            f"{error}; also LLaVA and DenseConnector folders (config.json with mm_vision_tower), and model_type"
            f" {', '.join(HF_LLAVA_TYPES)}"
        ) from None
    checkpoint = open_checkpoint(folder, flag)
    reader = language_part(checkpoint, {name: name for name in checkpoint.names()}, language, what)
    model = ModelFolder("hf", folder, language, reader, folder, config)
    if not vision_tower:
        if projector or kind:
            given = f"--projector {projector}" if projector else f"--mm_dense_connector_type {kind}"
            raise UserError(f"{given}: give the tower that it belongs to with --vision-tower")
        return model
    vision = VisionConfig.from_folder(vision_tower, "--vision-tower")
    tower_config, processor = read_tower_config(vision_tower, "--vision-tower")
    connector = (recorded_connector(projector, "--projector") if projector else None) or (
        ConnectorConfig(kind or "dci", select_layer=select_layer) if kind or projector else None
    )
    if connector and kind and connector.dense_connector_type != kind:
        raise UserError(
            f"--mm_dense_connector_type {kind}: {projector} was trained for {connector.dense_connector_type}"
        )
    model = replace(
        model,
        vision=vision,
        connector=connector,
        tower_folder=vision_tower,
        tower_config=tower_config,
        processor_config=processor,
    )
    # Opening checks its names and shapes.
    tower_of(model)
    if projector:
        tensors, _ = read_projector(
            projector, connector, vision, language.hidden_size, type_named=bool(kind), flag="--projector"
        )
        named = {PROJECTOR + key.removeprefix("mlp."): value for key, value in tensors.items()}
        model = replace(model, reader=Merged([reader, InMemory(named)]))
    return model


def _with_connector_type(model: ModelFolder, kind: str, what: str) -> ModelFolder:
    """``model`` with a connector of type ``kind``: sci and dci start from none with zeros for the lower layers."""
    found = model.connector.dense_connector_type
    if kind == found:
        return model
    if found != "none" or kind not in ("sci", "dci"):
        raise UserError(
            f"--mm_dense_connector_type {kind}: {what} has a {found} connector"
            + ("; sci and dci can start from it" if found == "none" else "; leave the flag out")
        )
    name = f"{PROJECTOR}0.weight"
    others = {n: n for n in model.reader.names() if n != name}
    widened = ColumnBlocks(model.reader, name, name, model.vision.hidden_size, [[(0, 1)], [], []])
    connector = replace(model.connector, dense_connector_type=kind)
    return replace(model, connector=connector, reader=Merged([Renamed(model.reader, others), widened]))
