"""The key of an index: a hash of everything that its content depends on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pyarrow as pa
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.errors import UserError

# The files of a tokenizer's folder that decide about ids.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
# The code that decides which records are kept and what is stored of them. Files without effect on a finished index
# (how it is built in parallel, how it is read) are not among them.
_CODE_FILES = (
    "config/tiling.py",
    "data/conversation.py",
    "data/faults.py",
    "data/image_header.py",
    "data/image_reference.py",
    "data/index_samples.py",
    "data/json_stream.py",
    "data/llava_json.py",
    "data/picture.py",
    "data/record_pictures.py",
    "data/tokenization.py",
    "data/video.py",
)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def index_key(config: DataConfig) -> str:
    """32 hex digits over data files, tokenizer files, the settings that matter, and the code that makes an index.

    Pictures count by their names and locations only. Weights, packing, order and sequence length do not count: they
    are applied to a finished index. Raises UserError where a data file is missing.
    """
    import tokenizers

    for source in config.sources:
        if not os.path.isfile(source.data_path):
            raise UserError(f"--data_path {source.data_path}: no such file")
    digest = xxhash.xxh3_128()
    settings = {
        "image_folders": [source.image_folder for source in config.sources],
        "version": config.version,
        "model_max_length": config.model_max_length,
        "video_frames": config.video_frames,
        "tiling": asdict(config.tiling),
        "libraries": [pa.__version__, tokenizers.__version__],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    tokenizer = [os.path.join(config.tokenizer_path, name) for name in _TOKENIZER_FILES]
    code = [os.path.join(_PACKAGE, name) for name in _CODE_FILES]
    for path in [*(source.data_path for source in config.sources), *tokenizer, *code]:
        if os.path.isfile(path):
            _hash_file(digest, path)
    return digest.hexdigest()


def _hash_file(digest, path: str) -> None:
    # The name and size keep "ab" + "c" apart from "a" + "bc".
    digest.update(f"{os.path.basename(path)}:{os.path.getsize(path)}".encode())
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
