"""What lies in a ``--save`` folder beside Megatron's tree: manifests, the Hugging Face side files, the description.

    DIR/latest_checkpointed_iteration.txt   Megatron's tracker
    DIR/iter_0000500/                       Megatron's torch_dist files, and dc_manifest.json, written last
    DIR/hf/                                 config.json and tokenizer of the language model, dc_megatron.json
    DIR/hf/vision_tower/                    config.json and preprocessor_config.json of the tower

An iteration without a manifest that its files agree with was not written to its end.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, replace

import xxhash

from dc_megatron.errors import UserError
from dc_megatron.weights.weight_files import find_weights

MANIFEST = "dc_manifest.json"
DESCRIPTION = "dc_megatron.json"
TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|"
    r"generation_config\.json|config\.json)"
)
_VISION_FILES = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class CheckpointDescription:
    """What is needed to use a checkpoint and stands in none of its tensors."""

    vision_tower: str
    vision_tower_hash: str
    mm_dense_connector_type: str
    mm_projector_type: str
    mm_vision_select_layer: int
    version: str
    image_aspect_ratio: str
    model_max_length: int


def iteration_folder(folder: str, iteration: int) -> str:
    return os.path.join(folder, f"iter_{iteration:07d}")


def write_json(path: str, content: dict) -> None:
    """Write ``content`` so that a reader sees the old file or the whole new one, also after a power cut."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _file_sizes(folder: str) -> dict[str, int]:
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            # .nfs: files that somebody deleted and somebody else holds open; they vanish by themselves.
            if name != MANIFEST and not name.endswith(".tmp") and not name.startswith(".nfs"):
                found[os.path.relpath(path, folder)] = os.path.getsize(path)
    return found


def discard_iteration(folder: str, iteration: int) -> None:
    """Remove what an earlier attempt left of an iteration that is about to be written.

    Written over, a manifest of the earlier attempt could vouch for a mixture of both. It is renamed first, to a name
    that stands for no iteration: deleting takes time, and a run that ends meanwhile must not leave half of it.
    """
    target = iteration_folder(folder, iteration)
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, f"{target}.discarded-{uuid.uuid4().hex}")
    # Also those that an earlier run was killed over. What cannot be deleted now is in nobody's way.
    for aside in glob.glob(f"{glob.escape(target)}.discarded-*"):
        shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: str, iteration: int, content: dict) -> None:
    """Declare an iteration complete: every file with its size, and ``content``. Call it when all else is on disk."""
    target = iteration_folder(folder, iteration)
    write_json(os.path.join(target, MANIFEST), {"iteration": iteration, **content, "files": _file_sizes(target)})


def read_manifest(folder: str, iteration: int) -> dict | None:
    """The manifest of an iteration, or None where it is absent, unreadable or disagrees with the files.

    Every file that it lists must be there with its size. Others do not matter: file managers, network disks and
    copying programs leave theirs, and the engine reads none that it did not write.
    """
    target = iteration_folder(folder, iteration)
    try:
        with open(os.path.join(target, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        sizes = manifest["files"].items()
        return manifest if all(os.path.getsize(os.path.join(target, name)) == size for name, size in sizes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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


def is_release(folder: str) -> bool:
    """Whether the folder holds a converted model (Megatron's ``release`` tree) rather than a training state."""
    try:
        with open(os.path.join(folder, TRACKER), encoding="utf-8") as file:
            return file.read().strip() == "release"
    except OSError:
        return False


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

    The tower's path is written as an absolute one: the checkpoint may be used from another working folder.
    """
    described = replace(description, vision_tower=os.path.abspath(description.vision_tower))
    target = os.path.join(folder, "hf")
    tower = os.path.join(target, "vision_tower")
    os.makedirs(tower, exist_ok=True)
    for name in os.listdir(language_folder):
        if _TOKENIZER_FILES.fullmatch(name):
            _copy(os.path.join(language_folder, name), os.path.join(target, name))
    for name in _VISION_FILES:
        source = os.path.join(description.vision_tower, name)
        if os.path.isfile(source):
            _copy(source, os.path.join(tower, name))
    write_json(os.path.join(target, DESCRIPTION), asdict(described))


def _copy(source: str, target: str) -> None:
    if os.path.realpath(source) != os.path.realpath(target):
        shutil.copyfile(source, target)


def read_description(folder: str, flag: str = "--load") -> CheckpointDescription:
    """The description in ``folder``; UserError where it is no checkpoint of this program."""
    path = os.path.join(folder, "hf", DESCRIPTION)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder")
    try:
        with open(path, encoding="utf-8") as file:
            return CheckpointDescription(**json.load(file))
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: has no hf/{DESCRIPTION}; give an --output_dir of training") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{flag} {folder}: hf/{DESCRIPTION} cannot be read: {error}") from None
