"""The language model below adapters: it is not saved, so a checkpoint names its folder and the hashes of its files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dc_megatron.errors import UserError
from dc_megatron.weights.durable_files import hash_file
from dc_megatron.weights.weight_files import find_weights


def hash_base(folder: str, share: int = 0, of: int = 1, flag: str = "--model_name_or_path") -> dict[str, str]:
    """File name -> xxh3 (16 hex digits) of the files of weights in ``folder``: of the ``share``-th of ``of`` parts.

    UserError where there are no weights.
    """
    names = find_weights(folder, f"{flag} {folder}")[0]
    # By size, so that every process reads about as much.
    names = sorted(names, key=lambda name: (-os.path.getsize(os.path.join(folder, name)), name))
    return {name: hash_file(os.path.join(folder, name)).xxh3_64 for name in names[share::of]}


def refuse_another_base(
    folder: str,
    recorded: Mapping[str, str],
    trained: str,
    share: int = 0,
    of: int = 1,
    flag: str = "--model_name_or_path",
) -> None:
    """UserError where weights in ``folder`` are not those that the checkpoint ``trained`` has its adapters for."""
    found = hash_base(folder, share, of, flag)
    others = sorted(name for name, digest in found.items() if recorded.get(name) != digest)
    if others or len(find_weights(folder, f"{flag} {folder}")[0]) != len(recorded):
        which = f" ({', '.join(others[:4])} differs)" if others else ""
        raise UserError(
            f"{flag} {folder}: its weights are not those that the adapters in {trained} were trained on{which}; give"
            " the folder with those"
        )
