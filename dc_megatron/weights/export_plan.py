"""What an export consists of, before a byte of it is written, and the parts that all formats share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dc_megatron.weights.tensor_reader import TensorReader

# The class of transformers behind each model_type of a language model.
TEXT_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi": "PhiForCausalLM",
}

# Entries of a configuration that speak of a file of weights and not of the model.
_OF_THE_FILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "auto_map")


@dataclass(frozen=True)
class Export:
    """A folder to be written. Whoever writes it may cast ``tensors`` and divides them over files.

    ``config`` is the content of ``config.json``, which is in ``files`` too. ``notes`` are for the user: what the
    target reads differently, or what it needs.
    """

    tensors: TensorReader  # under the names that they have in the target's files
    files: Mapping[str, bytes]  # name -> content
    copies: Mapping[str, str]  # name -> path of a file to copy
    config: dict
    notes: list[str] = field(default_factory=list)
    # The id that stands for one position of a picture, where the target's tokenizer needs one.
    image_token_id: int | None = None


def json_bytes(content: dict) -> bytes:
    """As transformers writes its configurations."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def portable_text_config(config: dict, dtype: torch.dtype) -> dict:
    """A text model's configuration in the words that transformers 4 and 5 both read.

    transformers 5 writes ``rope_parameters`` and ``dtype``, which transformers 4 passes over without a word: the
    rotary base would fall back to 10000, and the share of a head that Phi rotates to a half.
    """
    written = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    rope = dict(written.pop("rope_parameters", None) or written.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or written.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    written["rope_theta"] = float(theta)
    if (share := rope.pop("partial_rotary_factor", None)) is not None:
        written["partial_rotary_factor"] = share
    written["rope_scaling"] = rope if kind != "default" else None
    written["torch_dtype"] = dtype_name(dtype)
    return written
