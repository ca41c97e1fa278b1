"""Hugging Face, LLaVA and llava-hf folders into Megatron's torch_dist tree: no model, no torchrun, no GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from dc_megatron.config import IMAGE_ASPECT_RATIOS, TEMPLATES, one_of, padded_vocab_size
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder
from dc_megatron.weights.durable_files import PartialFolder
from dc_megatron.weights.folder_identity import folder_identity
from dc_megatron.weights.manifest import MANIFEST, manifest_bytes
from dc_megatron.weights.model_folder import open_model
from dc_megatron.weights.model_parts import NEWLINE, PROJECTOR, TOWER, ModelFolder
from dc_megatron.weights.progress import Progress
from dc_megatron.weights.projector_files import projector_shapes
from dc_megatron.weights.safetensors_writer import SafetensorsWriter
from dc_megatron.weights.tensor_reader import Renamed, TensorReader
from dc_megatron.weights.torch_dist_writer import Part, TorchDistWriter, TreeTensor
from dc_megatron.weights.tree_tables import TreeEntry, extra_state_keys, tree_entries
from dc_megatron.weights.views import AsMegatron

RELEASE = "release"
# The default of training where a folder does not say.
_MODEL_MAX_LENGTH = 2048

# What Megatron asks of the common state of a checkpoint that holds weights only (megatron-core 0.19.2).
_COMMON_STATE = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "num_floating_point_operations_so_far": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


@dataclass(frozen=True)
class Converted:
    """What a conversion did. ``notes`` are for the user."""

    folder: str
    tensors: int
    num_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    hf: str,
    save: str,
    *,
    vision_tower: str = "",
    projector: str = "",
    dense_connector_type: str = "",
    version: str = "",
    image_aspect_ratio: str = "",
    progress: Callable[[str, int], Progress] = Progress,
) -> Converted:
    """Write ``save`` with ``release/``, ``hf/`` and the tracker, in the dtypes of ``hf``.

    ``save`` appears when it is whole; an interrupted import is taken up by the same call. UserError: folders that are
    no model, incomplete or contradictory, settings that nobody knows, a target that exists, no room.
    """
    if version:
        one_of(version, TEMPLATES, "--version")
    if image_aspect_ratio:
        one_of(image_aspect_ratio, IMAGE_ASPECT_RATIOS, "--image-aspect-ratio")
    if image_aspect_ratio == "anyres":
        raise UserError(
            "--image-aspect-ratio anyres: the folder of an AnyRes model says so itself, with its resolutions; leave"
            " the flag out"
        )
    model = open_model(
        hf,
        "--hf",
        vision_tower=vision_tower,
        projector=projector,
        dense_connector_type=dense_connector_type,
    )
    if image_aspect_ratio and model.image_grid_pinpoints:
        raise UserError(f"--image-aspect-ratio {image_aspect_ratio}: {hf} is an AnyRes model; leave the flag out")
    tensors = _tree_tensors(model)
    objects: dict[str, object] = {key: [None] for key in extra_state_keys(model.language)}
    objects["common_state/shard_0_1"] = [_COMMON_STATE]
    tree = TorchDistWriter(tensors, objects, RELEASE + "/")
    tower = _tower_writer(model)
    total = tree.num_bytes + (tower.num_bytes if tower else 0)

    with PartialFolder(save, _plan(hf, vision_tower, projector, model, version, image_aspect_ratio)) as partial:
        partial.refuse_small_disk(total)
        bar = progress("import", total)
        digests = tree.write(partial, bar)
        if tower is not None:
            tower.write(partial, bar)
        _write_side_files(partial, model, version or model.version, image_aspect_ratio or model.image_aspect_ratio)
        source = os.path.basename(os.path.normpath(hf))
        content = {"kind": "import", "iteration": 0, "source": source, "format": model.kind}
        partial.write(f"{RELEASE}/{MANIFEST}", manifest_bytes(content, digests))
        partial.write(checkpoint_folder.TRACKER, RELEASE.encode())
        partial.finish()
    return Converted(save, len(tensors), sum(tensor.num_bytes for tensor in tensors), bar.finish(), _notes(model))


def _tree_tensors(model: ModelFolder) -> list[TreeTensor]:
    """The tree's tensors, each knowing how to read itself from ``model.reader``."""
    rows = padded_vocab_size(model.language.vocab_size, 1)
    shapes = {}
    if model.has_projector:
        shapes = projector_shapes(model.connector, model.vision, model.language.hidden_size)
    full = AsMegatron(model.reader)
    tensors = []
    for entry in tree_entries(model.language, rows, shapes):
        if entry.rule is None:
            name = PROJECTOR + entry.key.removeprefix("connector.mlp.")
            tensors.append(_as_it_is(entry.key, entry.shape, model.reader, name))
        else:
            tensors.append(_from_table(entry, full))
    if NEWLINE in model.reader.names():
        tensors.append(_as_it_is(NEWLINE, model.reader.shape(NEWLINE), model.reader, NEWLINE))
    return tensors


def _from_table(entry: TreeEntry, full: AsMegatron) -> TreeTensor:
    layers: Sequence[int | None] = range(entry.layers) if entry.layers else (None,)
    kinds = {full.dtype(entry.rule, layer) for layer in layers}
    if len(kinds) > 1:
        listed = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UserError(
            f"{entry.rule.sources[0].name}: {listed} in different layers; they become one tensor and must have one"
            " dtype: convert the folder first"
        )

    def part(layer: int | None) -> Part:
        return Part(
            layer,
            lambda start, end, out: full.read_rows(entry.rule, layer, start, end, out),
            full.position(entry.rule, layer),
        )

    return TreeTensor(entry.key, entry.shape, kinds.pop(), tuple(part(layer) for layer in layers))


def _as_it_is(key: str, shape: tuple[int, ...], reader: TensorReader, name: str) -> TreeTensor:
    def read(start: int, end: int, out) -> None:
        reader.read_rows(name, start, end, out)

    return TreeTensor(key, tuple(shape), reader.dtype(name), (Part(None, read, reader.position(name)),))


def _tower_writer(model: ModelFolder) -> SafetensorsWriter | None:
    """For a tower whose weights lie among the model's: it becomes a Hugging Face folder of its own."""
    names = {
        model.vision.about.level + name.removeprefix(TOWER): name
        for name in model.reader.names()
        if name.startswith(TOWER)
    }
    return SafetensorsWriter(Renamed(model.reader, names), folder="hf/vision_tower/") if names else None


def _write_side_files(partial: PartialFolder, model: ModelFolder, version: str, image_aspect_ratio: str) -> None:
    """``hf/``: what training and inference need beside the tree."""
    connector = model.connector
    described = checkpoint_folder.CheckpointDescription(
        vision_tower=model.tower_folder,
        vision_tower_hash=checkpoint_folder.hash_folder_weights(model.tower_folder) if model.tower_folder else "",
        mm_dense_connector_type=connector.dense_connector_type if connector else "",
        mm_projector_type=connector.projector_type if connector else "",
        mm_vision_select_layer=connector.select_layer if connector else -2,
        version=version,
        image_aspect_ratio=image_aspect_ratio,
        model_max_length=model.model_max_length or _MODEL_MAX_LENGTH,
        image_grid_pinpoints=[list(size) for size in model.image_grid_pinpoints or ()] or None,
        mm_patch_merge_type=model.mm_patch_merge_type,
    )
    checkpoint_folder.write_side_files(partial.path, model.config_folder, described)
    _write_json(partial, "hf/config.json", model.language_config)
    if model.has_tower:
        tower = os.path.join(partial.path, "hf", "vision_tower")
        _write_json(partial, "hf/vision_tower/config.json", model.tower_config)
        if model.processor_config:
            _write_json(partial, "hf/vision_tower/preprocessor_config.json", model.processor_config)
        here = {"vision_tower": "vision_tower", "vision_tower_hash": checkpoint_folder.hash_folder_weights(tower)}
        _write_json(partial, f"hf/{checkpoint_folder.DESCRIPTION}", {**asdict(described), **here})


def _write_json(partial: PartialFolder, name: str, content: dict) -> None:
    partial.write(name, (json.dumps(content, indent=2) + "\n").encode())


def _plan(hf: str, vision_tower: str, projector: str, model: ModelFolder, *settings: str) -> str:
    connector = asdict(model.connector) if model.connector else {}
    folders = [folder_identity(path) if path else "" for path in (hf, vision_tower, projector)]
    return json.dumps(["import", 1, folders, connector, settings])


def _notes(model: ModelFolder) -> list[str]:
    if model.has_projector:
        return []
    return ["without a projector: training starts a new connector, or takes one from --pretrain_mm_mlp_adapter"]
