"""Where a projector is taken from: a file of its own, the folder of a run, or the tree of a checkpoint."""

from __future__ import annotations

import os

from dc_megatron.config import ConnectorConfig, VisionConfig
from dc_megatron.errors import UserError
from dc_megatron.weights import checkpoint_folder, manifest
from dc_megatron.weights.safetensors_files import open_file
from dc_megatron.weights.tensor_reader import Renamed, TensorReader
from dc_megatron.weights.torch_dist_tree import TorchDistTree
from dc_megatron.weights.tree_tables import TOWER_KEY
from dc_megatron.weights.views import PlainTensors

SAFETENSORS_NAME = "mm_projector.safetensors"
BIN_NAME = "mm_projector.bin"
KEY = "model.mm_projector."
NEWLINE = "image_newline"
PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")
_HASH, _TRAINED = "vision_tower_hash", "vision_tower_trained"


def projector_metadata(
    connector: ConnectorConfig, vision: VisionConfig, tower_hash: str = "", tower_trained: bool = False
) -> dict[str, str]:
    """What a projector file says about itself; safetensors metadata are strings.

    tower_hash: of the tower's folder (``checkpoint_folder.hash_folder_weights``). tower_trained: the tower has learned
    beside the projector since, and is in no folder of its own.
    """
    said = {
        "format": "pt",
        "mm_dense_connector_type": connector.dense_connector_type,
        "mm_projector_type": connector.projector_type,
        # SigLIP ignores it, so it must not tell two files apart.
        "mm_vision_select_layer": "ignored" if vision.about.ends_early else str(connector.select_layer),
        "vision_family": vision.family,
        "vision_hidden_size": str(vision.hidden_size),
        "vision_num_hidden_layers": str(vision.num_hidden_layers),
        "vision_image_size": str(vision.image_size),
        "vision_patch_size": str(vision.patch_size),
        "vision_tower": os.path.basename(os.path.normpath(vision.path)) if vision.path else "",
    }
    said |= {_HASH: tower_hash} if tower_hash else {}
    return said | ({_TRAINED: "true"} if tower_trained else {})


def open_projector(path: str, flag: str) -> tuple[str, TensorReader, dict[str, str]]:
    """(what it is, for messages; tensors under LLaVA's names; what it says about itself: ``projector_metadata``).

    ``path``: a projector file, a folder with one, an --output_dir of training or a folder of tools/convert.py import
    (then the newest complete tree), or one iteration in such a folder. UserError: none of these.
    """
    file = path if os.path.isfile(path) else next(filter(os.path.isfile, _candidates(path)), None)
    if file is not None:
        opened = open_file(file, f"{flag} {file}")
        return f"{flag} {file}", opened, dict(opened.metadata)
    if not os.path.isdir(path):
        raise UserError(f"{flag} {path}: no such file or folder")
    tree = _tree(path, flag)
    if tree is None:
        raise UserError(
            f"{flag} {path}: the folder has neither {SAFETENSORS_NAME} nor {BIN_NAME}, and is no checkpoint; give a"
            " projector file, the --output_dir of a run, or one of its iterations"
        )
    return _of_tree(tree, flag)


def _candidates(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in (SAFETENSORS_NAME, BIN_NAME)]


def _tree(path: str, flag: str) -> str | None:
    """The complete tree that ``path`` is, or the newest one in it; None where it has none at all."""
    path = os.path.normpath(path)
    if checkpoint_folder.tree_kind(path) == "torch_dist":
        whole, why = manifest.read_manifest(path)
        if whole is None:
            raise UserError(f"{flag} {path}: not a complete checkpoint ({why}); give another iteration")
        return path
    found = checkpoint_folder.find_tree(path)
    return found.path if found else None


def _of_tree(path: str, flag: str) -> tuple[str, TensorReader, dict[str, str]]:
    tree, what, folder = TorchDistTree(path, flag), f"{flag} {path}", os.path.dirname(path)
    places = {f"{KEY}{part}": f"connector.mlp.{part}" for part in PARTS} | {f"model.{NEWLINE}": NEWLINE}
    reader = Renamed(PlainTensors(tree), {name: key for name, key in places.items() if tree.has(key)})
    if not reader.names():
        raise UserError(f"{what}: holds a language model alone, no connector; give a run that has trained one")
    described = checkpoint_folder.read_description(folder, flag)
    side = os.path.join(folder, "hf", "vision_tower")
    vision = VisionConfig.from_folder(side if os.path.isdir(side) else described.vision_tower, flag)
    connector = ConnectorConfig(
        described.mm_dense_connector_type, described.mm_projector_type, described.mm_vision_select_layer
    )
    trained = tree.has(TOWER_KEY)
    said = projector_metadata(connector, vision, described.vision_tower_hash, trained)
    return what, reader, {**said, "vision_tower": os.path.basename(os.path.normpath(described.vision_tower))}


def refuse_other_tower(
    path: str, tower: str, flag: str = "--pretrain_mm_mlp_adapter", trained_here: bool = False
) -> None:
    """UserError where the projector in ``path`` says that it was trained on other weights than the folder ``tower``'s.

    trained_here: the run takes a tower that was trained, out of a checkpoint. The tower's files are read: a gigabyte in
    a second.
    """
    what, _, said = open_projector(path, flag)
    name = said.get("vision_tower") or "name not recorded"
    if said.get(_TRAINED) and not trained_here:
        raise UserError(
            f"{what}: was trained together with its vision tower ({name} at the start), which is in the checkpoint of"
            " that run alone; take both from there: --load DIR --finetune"
        )
    wanted = said.get(_HASH)
    if wanted and checkpoint_folder.hash_folder_weights(tower) != wanted:
        raise UserError(
            f"{what}: was trained on another vision tower ({name}, hash {wanted}) than --vision_tower {tower}, whose"
            " weights differ; give that tower, or train a projector for this one"
        )
