"""The language model below adapters: it is not saved, so a checkpoint names its folder and the hashes of its files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dc_megatron.errors import UserError
from dc_megatron.weights.checkpoint_folder import CheckpointDescription
from dc_megatron.weights.durable_files import hash_file
from dc_megatron.weights.weight_files import find_weights

_FLAG = "--model_name_or_path"


def base_folder(described: CheckpointDescription, checkpoint: str, given: str = "", flag: str = "--load") -> str:
    """Where the model below the adapters of ``checkpoint`` lies: where it was in training, or in ``given``."""
    folder = given or described.language_model
    if not os.path.isdir(folder):
        raise UserError(
            f"{flag} {checkpoint}: holds adapters; the language model that they were trained on was {folder}, which is"
            f" not there; name it: {_FLAG} DIR"
        )
    return folder


def hash_base(folder: str) -> dict[str, str]:
    """File name -> xxh3 (16 hex digits) of the files of weights in ``folder``, of this process's share of them.

    Every node reads all of its own copy: torchrun's processes of a node share it out; a process that nobody launched
    reads all. UserError where there are no weights.
    """
    names = find_weights(folder, f"{_FLAG} {folder}")[0]
    # By size, so that every process reads about as much.
    names = sorted(names, key=lambda name: (-os.path.getsize(os.path.join(folder, name)), name))
    share, of = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {name: hash_file(os.path.join(folder, name)).xxh3_64 for name in names[share::of]}


def refuse_another_base(folder: str, recorded: Mapping[str, str] | None, checkpoint: str) -> None:
    """UserError where weights in ``folder`` are not those that the adapters in ``checkpoint`` were trained on.

    recorded: of its description. Only this process's share is read, see ``hash_base``.
    """
    recorded, found = recorded or {}, hash_base(folder)
    others = sorted(name for name, digest in found.items() if recorded.get(name) != digest)
    if others or len(find_weights(folder, f"{_FLAG} {folder}")[0]) != len(recorded):
        which = f" (not the same: {', '.join(others[:4])})" if others else ""
        raise UserError(
            f"{_FLAG} {folder}: its weights are not those that the adapters in {checkpoint} were trained on{which};"
            " give the folder with those"
        )
