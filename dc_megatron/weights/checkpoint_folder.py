"""What lies in a ``--save`` folder beside Megatron's tree: manifests, the Hugging Face side files, the description.

    DIR/latest_checkpointed_iteration.txt   Megatron's tracker, which nothing here believes
    DIR/iter_0000500/                       Megatron's torch_dist files, and dc_manifest.json, written last
    DIR/release/                            the same for a converted model: weights and nothing else
    DIR/hf/                                 config.json and tokenizer of the language model, dc_megatron.json
    DIR/hf/vision_tower/                    config.json and preprocessor_config.json of the tower

A tree without a manifest that its files agree with was not written to its end.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace

import xxhash

from dc_megatron.config import LoraConfig
from dc_megatron.errors import UserError
from dc_megatron.weights import durable_files, manifest
from dc_megatron.weights.manifest import MANIFEST, Manifest
from dc_megatron.weights.weight_files import find_weights, tokenizer_files

DESCRIPTION = "dc_megatron.json"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})")
_VISION_FILES = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class CheckpointDescription:
    """What is needed to use a checkpoint and stands in none of its tensors.

    Empty strings are things that nobody has said yet: a language model that was imported alone has neither tower nor
    connector.
    """

    vision_tower: str
    vision_tower_hash: str
    mm_dense_connector_type: str
    mm_projector_type: str
    mm_vision_select_layer: int
    version: str
    image_aspect_ratio: str
    model_max_length: int
    # AnyRes: resolutions as LLaVA writes them, (width, height).
    image_grid_pinpoints: list[list[int]] | None = None
    # AnyRes: how tiles are joined; "" in files from before the others were available.
    mm_patch_merge_type: str = ""
    # Adapters on a language model that is not in the tree: their size (0: there are none), and that model's folder and
    # files with their hashes.
    lora_r: int = 0
    lora_alpha: int = 0
    lora_dropout: float = 0.0
    language_model: str = ""
    language_model_files: dict[str, str] | None = None

    @property
    def lora(self) -> LoraConfig | None:
        return LoraConfig(self.lora_r, self.lora_alpha, self.lora_dropout) if self.lora_r else None

    @property
    def merge_type(self) -> str:
        return self.mm_patch_merge_type or ("spatial_unpad" if self.image_grid_pinpoints else "flat")


@dataclass(frozen=True)
class Tree:
    """A complete tree of Megatron's in ``folder``; ``iteration`` is None for a converted model."""

    folder: str
    iteration: int | None
    manifest: Manifest

    @property
    def path(self) -> str:
        return tree_folder(self.folder, self.iteration)


def iteration_folder(folder: str, iteration: int) -> str:
    return os.path.join(folder, f"iter_{iteration:07d}")


def tree_folder(folder: str, iteration: int | None) -> str:
    """Where the tree of ``iteration`` lies; None: that of a converted model."""
    return os.path.join(folder, RELEASE) if iteration is None else iteration_folder(folder, iteration)


def write_json(path: str, content: dict) -> None:
    """Write ``content`` so that a reader sees the old file or the whole new one, also after a power cut."""
    _write_if_new(path, json.dumps(content, indent=1).encode())


def _write_if_new(path: str, data: bytes) -> None:
    """Every save of a run writes the same side files: what is there already costs no write."""
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return
    except OSError:
        pass
    durable_files.write_file(path, data)


def write_tracker(folder: str, iteration: int) -> None:
    """Name the newest iteration as Megatron does, for programs that look there."""
    durable_files.write_file(os.path.join(folder, TRACKER), str(iteration).encode())


def read_manifest(folder: str, iteration: int | None) -> Manifest | None:
    """The manifest of an iteration (None: of a converted model), or None where the tree is not complete."""
    return manifest.read_manifest(tree_folder(folder, iteration))[0]


def why_incomplete(folder: str, iteration: int | None) -> str:
    """What keeps a tree from being complete, with the file's name; "" where it is."""
    return manifest.read_manifest(tree_folder(folder, iteration))[1]


def iterations(folder: str) -> list[int]:
    """Iterations that have a folder, complete or not, ascending."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(m.group(1)) for m in map(_ITERATION.fullmatch, os.listdir(folder)) if m)


def newest_complete(folder: str) -> tuple[int | None, list[int]]:
    """The newest complete iteration, and the incomplete ones above it that are passed over."""
    incomplete = []
    for iteration in reversed(iterations(folder)):
        if read_manifest(folder, iteration) is not None:
            return iteration, incomplete
        incomplete.append(iteration)
    return None, incomplete


def find_tree(folder: str, step: int | None = None) -> Tree | None:
    """The complete tree to take: iteration ``step``; by default the newest iteration, else a converted model."""
    iteration = newest_complete(folder)[0] if step is None else step
    found = read_manifest(folder, iteration)
    return None if found is None else Tree(folder, iteration, found)


def is_release(folder: str) -> bool:
    """Whether the folder holds a complete converted model (Megatron's ``release`` tree), whatever the tracker says."""
    return read_manifest(folder, None) is not None


def trees_of_others(folder: str) -> list[str]:
    """Names of trees that another program wrote: neither a manifest in them nor a description beside them."""
    if os.path.isfile(os.path.join(folder, "hf", DESCRIPTION)):
        return []
    found = [iteration_folder("", iteration) for iteration in iterations(folder)]
    found += [RELEASE] if os.path.isdir(os.path.join(folder, RELEASE)) else []
    return [name for name in found if not os.path.isfile(os.path.join(folder, name, MANIFEST))]


def what_of_others(folder: str, names: list[str]) -> str:
    """Why trees of others are no use here, and what to do."""
    kind = tree_kind(os.path.join(folder, names[0]))
    return (
        f"{', '.join(names[:4])} has no {MANIFEST} and there is no hf/{DESCRIPTION}: {_KINDS[kind]} of another program;"
        " write it as a Hugging Face folder with that program (Megatron-LM's tools/checkpoint, Megatron-Bridge) and"
        " convert that: tools/convert.py import --hf DIR --save DIR"
    )


_KINDS = {
    "torch_dist": "a torch_dist tree",
    "mp_rank": "a legacy tree (mp_rank_XX)",
    "fsdp_dtensor": "an fsdp_dtensor or torch_dcp tree",
    "zarr": "a zarr tree",
    "unknown": "a tree",
}


def tree_kind(path: str) -> str:
    """``torch_dist``, ``mp_rank`` (legacy), ``fsdp_dtensor`` (or torch_dcp), ``zarr`` or ``unknown``, by file names."""
    names = os.listdir(path) if os.path.isdir(path) else []
    if any(name.startswith("mp_rank_") for name in names):
        return "mp_rank"
    if "metadata.json" in names:
        try:
            with open(os.path.join(path, "metadata.json"), "rb") as file:
                backend = json.load(file)["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "unknown"
        return backend if backend in ("torch_dist", "zarr") else "unknown"
    return "fsdp_dtensor" if ".metadata" in names else "unknown"


def hash_folder_weights(folder: str, flag: str = "--vision_tower") -> str:
    """xxh3 over the files of a Hugging Face folder that weights are loaded from, names included; 16 hex digits.

    UserError where there are none.
    """
    digest = xxhash.xxh3_64()
    for name in find_weights(folder, f"{flag} {folder}")[0]:
        digest.update(name.encode())
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def write_side_files(folder: str, language_folder: str, description: CheckpointDescription) -> None:
    """Make the checkpoint usable without the folders it was trained from, save the frozen tower's weights.

    Paths are written as absolute ones: the checkpoint may be used from another working folder. A file that
    is there already and differs is replaced by a rename.
    """
    path = description.vision_tower
    base = description.language_model
    described = replace(
        description,
        vision_tower=os.path.abspath(path) if path else "",
        language_model=os.path.abspath(base) if base else "",
    )
    target = os.path.join(folder, "hf")
    tower = os.path.join(target, "vision_tower")
    os.makedirs(tower, exist_ok=True)
    for name, path in tokenizer_files(language_folder).items():
        _copy(path, os.path.join(target, name))
    _copy(os.path.join(language_folder, "config.json"), os.path.join(target, "config.json"))
    for name in _VISION_FILES:
        source = os.path.join(description.vision_tower, name)
        if description.vision_tower and os.path.isfile(source):
            _copy(source, os.path.join(tower, name))
    write_json(os.path.join(target, DESCRIPTION), asdict(described))


def _copy(source: str, target: str) -> None:
    with open(source, "rb") as file:
        _write_if_new(target, file.read())


def read_description(folder: str, flag: str = "--load") -> CheckpointDescription:
    """The description in ``folder``; UserError where it is no checkpoint of this program."""
    path = os.path.join(folder, "hf", DESCRIPTION)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder")
    try:
        with open(path, encoding="utf-8") as file:
            described = _description(json.load(file))
    except FileNotFoundError:
        raise UserError(
            f"{flag} {folder}: has no hf/{DESCRIPTION}; give an --output_dir of training or of tools/convert.py import;"
            " for a copy of one, copy its hf folder as well"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag} {folder}: hf/{DESCRIPTION} cannot be read: {error}") from None
    if described.vision_tower:
        # A path that is not absolute lies in the checkpoint, which may have been moved.
        within = os.path.join(os.path.abspath(folder), "hf", described.vision_tower)
        described = replace(described, vision_tower=within)
    return described


def _description(content: object) -> CheckpointDescription:
    """``content`` of the file as a description; ValueError that names the entry which is missing or of another type."""
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    known = {entry.name: entry for entry in fields(CheckpointDescription)}
    absent = [name for name, entry in known.items() if name not in content and entry.default is MISSING]
    if absent or content.keys() - known.keys():
        wrong = absent or sorted(content.keys() - known.keys())
        raise ValueError(f"entries {'missing' if absent else 'not known here'}: {', '.join(map(str, wrong))}")
    for name, value in content.items():
        if name == "image_grid_pinpoints":
            fits = value is None or (isinstance(value, list) and all(_is_size(pair) for pair in value))
        elif name == "language_model_files":
            fits = value is None or (isinstance(value, dict) and all(type(digest) is str for digest in value.values()))
        else:
            fits = type(value) is {"str": str, "int": int, "float": float}[known[name].type]
        if not fits:
            raise ValueError(f"{name} is {json.dumps(value)}")
    return CheckpointDescription(**content)


def _is_size(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
