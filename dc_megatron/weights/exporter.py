"""From a training checkpoint of any layout to a folder that others can serve, in one process and bounded memory."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from dc_megatron.config import one_of
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import PartialFolder
from dc_megatron.weights.export_plan import TEXT_ARCHITECTURES, Export, json_bytes, portable_text_config
from dc_megatron.weights.folder_identity import folder_identity
from dc_megatron.weights.hf_llava_format import hf_llava_export
from dc_megatron.weights.importer import Converted
from dc_megatron.weights.language_tables import EMBEDDING, HEADS
from dc_megatron.weights.llava_format import llava_export
from dc_megatron.weights.manifest import MANIFEST, damaged_files, manifest_bytes, read_manifest
from dc_megatron.weights.megatron_folder import is_checkpoint, open_checkpoint_folder
from dc_megatron.weights.model_folder import open_model
from dc_megatron.weights.model_parts import ModelFolder
from dc_megatron.weights.progress import Progress
from dc_megatron.weights.safetensors_writer import SafetensorsWriter
from dc_megatron.weights.tensor_reader import Renamed
from dc_megatron.weights.weight_files import tokenizer_files

FORMATS = ("hf", "llava", "hf-llava")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Processor(Protocol):
    """Tokenizer, processor and chat template of a stock Llava, which need more than this room may import."""

    def image_token(self, model: ModelFolder) -> tuple[int, int]:
        """(id of the token that stands for a position of a picture, rows that the embedding must have)."""

    def write(self, model: ModelFolder, export: Export, folder: str) -> None:
        """Write the files into ``folder``."""


def export_checkpoint(
    load: str,
    format: str,
    save: str,
    *,
    step: int | None = None,
    dtype: str = "",
    vision_tower: str = "",
    tower_name: str = "",
    modeling_code: bool = False,
    check: bool = True,
    processor: Processor | None = None,
    progress: Callable[[str, int], Progress] = Progress,
) -> Converted:
    """Write ``save`` in ``format`` from ``load``: a checkpoint of training or import, or any folder that can be read.

    ``dtype``: bf16, fp16 or fp32; "" keeps each tensor's. ``check``: read all files of the checkpoint besides and
    compare their hashes, and that of its tower; nothing appears where one differs. ``processor`` serves hf-llava.
    UserError: nothing to export, a model that the format cannot say, damaged files, another tower than that of
    training, a target that exists, no room.
    """
    one_of(format, FORMATS, "--format")
    if dtype:
        one_of(dtype, tuple(DTYPES), "--dtype")
    model, tree = open_any(load, step, vision_tower)
    if tree and check and format != "hf":
        _refuse_another_tower(load, model, vision_tower)
    stock = processor if format == "hf-llava" else None
    image_token = stock.image_token(model) if stock else None
    export = plan_export(model, format, DTYPES.get(dtype), tower_name, modeling_code, image_token)
    writer = SafetensorsWriter(export.tensors, DTYPES.get(dtype))
    settings = [format, dtype, tower_name, modeling_code]
    # The tower may lie elsewhere and be named by the model: its weights are a part of what is written.
    sources = [folder_identity(path) for path in (tree or load, os.path.join(load, "hf"), model.tower_folder)]
    plan = json.dumps(["export", 2, settings, sources])
    with tempfile.TemporaryDirectory() as beside:
        if stock:
            # First: what it refuses is refused before hours of writing.
            stock.write(model, export, beside)
        with PartialFolder(save, plan) as partial:
            bar = _write(partial, writer, export, beside, tree if check else "", progress)
            content = {"kind": "export", "format": format, "source": os.path.basename(os.path.normpath(load))}
            # An earlier attempt may have come as far as its manifest, which is about the other files.
            files = {name: digest for name, digest in partial.finished.items() if name != MANIFEST}
            partial.write(MANIFEST, manifest_bytes(content, files))
            partial.finish()
    return Converted(save, len(export.tensors.names()), writer.num_bytes, bar.finish(), export.notes)


def _refuse_another_tower(load: str, model: ModelFolder, given: str) -> None:
    """UserError where the tower's weights are not those that the checkpoint was trained with, as far as it says.

    A tower that is not there is refused by the formats that need one.
    """
    described = checkpoint_folder.read_description(load)
    tower = model.tower_folder or described.vision_tower
    wanted = described.vision_tower_hash
    if wanted and os.path.isdir(tower) and checkpoint_folder.hash_folder_weights(tower) != wanted:
        flag = f"--vision-tower {tower}" if given else f"--load {load}: the tower in {tower}"
        raise UserError(
            f"{flag}: its weights are not those that {load} was trained with; give the folder with those:"
            " --vision-tower DIR"
        )


def open_any(folder: str, step: int | None, vision_tower: str, flag: str = "--load") -> tuple[ModelFolder, str]:
    """(model, folder of its tree, or "" for folders that are no checkpoint of ours)."""
    if is_checkpoint(folder):
        return open_checkpoint_folder(folder, step, vision_tower, flag)
    if step is not None:
        raise UserError(f"--step {step}: {folder} is no checkpoint of training")
    return open_model(folder, flag, vision_tower=vision_tower), ""


def plan_export(
    model: ModelFolder,
    format: str,
    dtype: torch.dtype | None,
    tower_name: str = "",
    modeling_code: bool = False,
    image_token: tuple[int, int] | None = None,
) -> Export:
    """What an export in ``format`` consists of; nothing is read but headers.

    ``image_token``: (id of ``<image>``, rows of the embedding) for hf-llava; None: from the tokenizer's files.
    """
    if format == "hf":
        return _text_export(model, dtype)
    if format == "llava":
        return llava_export(model, dtype=dtype, vision_tower_name=tower_name)
    return hf_llava_export(model, dtype=dtype, modeling_code=modeling_code, image_token=image_token)


def _text_export(model: ModelFolder, dtype: torch.dtype | None) -> Export:
    names = {name: name for name in model.reader.names() if name.startswith("model.") or name in HEADS}
    tensors = Renamed(model.reader, names)
    kind = dtype or tensors.dtype(EMBEDDING)
    config = {
        **portable_text_config(model.language_config, kind),
        "architectures": [TEXT_ARCHITECTURES[model.language.model_type]],
        "model_type": model.language.model_type,
    }
    notes = []
    if model.has_projector:
        notes.append("the language model alone: connector and tower go into --format llava or hf-llava")
    return Export(tensors, {"config.json": json_bytes(config)}, tokenizer_files(model.config_folder), config, notes)


def _write(
    partial: PartialFolder, writer: SafetensorsWriter, export: Export, beside: str, tree: str, progress
) -> Progress:
    """All files but the manifest. ``beside``: a folder of further files; ``tree``: the one whose hashes to compare."""
    partial.refuse_small_disk(writer.num_bytes)
    checker = _Checker(tree) if tree else None
    bar = progress("export", writer.num_bytes)
    try:
        writer.write(partial, bar)
        for name, path in export.copies.items():
            partial.copy(path, name)
        for name, content in export.files.items():
            partial.write(name, content)
        # Last: the processor's generation settings know the template's end.
        for name in sorted(os.listdir(beside)):
            partial.copy(os.path.join(beside, name), name)
        damaged = checker.join() if checker else []
    except BaseException:
        if checker:
            checker.stop()
        raise
    if damaged:
        raise UserError(f"--load {tree}: {'; '.join(damaged)}. Export another checkpoint: --step N, or a good copy")
    return bar


class _Checker:
    """Compares the hashes of a tree in a thread of its own, beside the export that reads the same files."""

    def __init__(self, tree: str):
        manifest, reason = read_manifest(tree)
        assert manifest is not None, f"{tree}: {reason}"
        self._damaged: list[str] = []
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(tree, manifest), name="checker", daemon=True)
        self._thread.start()

    def _run(self, tree: str, manifest) -> None:
        try:
            self._damaged = damaged_files(tree, manifest, progress=self._leave_where_asked)
        except Exception as error:
            self._error = error

    def _leave_where_asked(self, num_bytes: int) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def stop(self) -> None:
        """Read no further: nobody will ask, and a checkpoint takes minutes."""
        self._stopped.set()
        self._thread.join()

    def join(self) -> list[str]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._damaged


class _Stopped(Exception):
    """The export has ended before its check."""
