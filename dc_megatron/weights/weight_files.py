"""Which files of a Hugging Face folder hold its weights, and which its tokenizer.

Needs no torch: nothing but an index is read.
"""

from __future__ import annotations

import os
import re

from dc_megatron.config import read_json_file
from dc_megatron.errors import UserError

# In the order in which transformers looks for them.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|"
    r"generation_config\.json)"
)


def tokenizer_files(folder: str) -> dict[str, str]:
    """Name -> path of the tokenizer's files and generation_config.json in ``folder``; not of folders named alike."""
    names = [name for name in sorted(os.listdir(folder)) if _TOKENIZER_FILES.fullmatch(name)]
    return {name: path for name in names if os.path.isfile(path := os.path.join(folder, name))}


def find_weights(folder: str, what: str) -> tuple[list[str], dict[str, str]]:
    """(file names, the index's tensor name -> file name) of the weights in ``folder``; one file has no index: {}.

    ``what`` begins the UserError that is raised where weights are missing, incomplete or lie outside the folder.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{what}: no such folder: {folder}")
    found = next((name for name in FILES if os.path.isfile(os.path.join(folder, name))), None)
    if found is None:
        raise UserError(f"{what}: no weights in the folder; looked for {', '.join(FILES)}")
    if not found.endswith(".index.json"):
        return [found], {}
    weight_map = read_json_file(folder, found, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{what}: {found} has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{what}: the weight_map of {found} does not name files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise UserError(f"{what}: {found} points outside the folder: {shard}")
    absent = [shard for shard in shards if not os.path.isfile(os.path.join(folder, shard))]
    if absent:
        raise UserError(
            f"{what}: {len(absent)} of {len(shards)} files that {found} names are missing:"
            f" {', '.join(absent[:8])}; fetch them"
        )
    return shards, weight_map
