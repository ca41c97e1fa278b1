"""Hugging Face folders of real models' shapes with random or absent content, to measure conversions and loading with.

Names are written down here a second time on purpose: a folder that the weights table refuses tells of a mistake in one
of the two. Neither torch nor the model is needed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from dataclasses import dataclass

import numpy as np

from dc_megatron.config import one_of
from dc_megatron.errors import UserError

# Values of the config.json that the makers published: meta-llama/Llama-2-7b-hf and meta-llama/Meta-Llama-3-70B.
# `torch_dtype` is what is written here (Llama 2 was published in float16).
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA_2_7B = _LLAMA | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
_LLAMA_3_70B = _LLAMA | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_TINY = _LLAMA_2_7B | {
    "hidden_size": 64,
    "intermediate_size": 176,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@dataclass(frozen=True)
class Shape:
    """``config``: the content of config.json. ``shard_bytes``: where a new file is begun."""

    config: dict
    shard_bytes: int = 5_000_000_000


SHAPES = {"7b": Shape(_LLAMA_2_7B), "70b": Shape(_LLAMA_3_70B), "tiny": Shape(_TINY, 100_000)}

_ITEM = 2  # bytes of a bfloat16
_BLOCK = 1 << 25  # bytes of random content made at once
_DESCRIPTION = "benchmark_shape.json"


def shape_of(name: str, layers: int | None = None) -> Shape:
    """The shape called ``name``, with ``layers`` instead of its own number where given."""
    shape = SHAPES[one_of(name, SHAPES, "--shape")]
    if layers is None:
        return shape
    if layers < 1:
        raise UserError(f"--layers {layers}: at least 1 is needed")
    config = copy.deepcopy(shape.config) | {"num_hidden_layers": layers}
    return Shape(config, shape.shard_bytes)


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a Llama with this config.json, in the order of the model."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def num_bytes(shape: Shape) -> int:
    """Bytes of all tensors in bfloat16."""
    return sum(_ITEM * math.prod(size) for size in tensor_shapes(shape.config).values())


def write_checkpoint(folder: str, name: str, layers: int | None = None, sparse: bool = False, seed: int = 0) -> None:
    """Write config.json and bfloat16 safetensors files with an index into ``folder``, flushed to disk.

    Content is random: finite numbers about the size of weights, no block of the disk like another. ``sparse`` writes
    headers only: the files have their size, take no room on the disk and read as zeros. A folder that is already what
    is asked for is left as it is.
    """
    if is_written(folder, name, layers, sparse, seed):
        return
    shape = shape_of(name, layers)
    os.makedirs(folder, exist_ok=True)
    _write_json(folder, "config.json", shape.config)
    files = _files(shape)
    content = None if sparse else RandomBytes(seed)
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(os.path.join(folder, file_name), tensors, content)
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {"total_size": num_bytes(shape)}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder, "model.safetensors.index.json", index)
    _write_json(folder, _DESCRIPTION, _description(name, layers, sparse, seed))


def is_written(folder: str, name: str, layers: int | None = None, sparse: bool = False, seed: int = 0) -> bool:
    """Whether ``folder`` holds what ``write_checkpoint`` writes with these arguments, to its end."""
    try:
        with open(os.path.join(folder, _DESCRIPTION), encoding="utf-8") as file:
            return json.load(file) == _description(name, layers, sparse, seed)
    except (OSError, ValueError):
        return False


def _description(name: str, layers: int | None, sparse: bool, seed: int) -> dict:
    shape = shape_of(name, layers)
    return {"config": shape.config, "shard_bytes": shape.shard_bytes, "sparse": sparse, "seed": seed}


def _write_json(folder: str, name: str, content: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _files(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file: divided in the model's order, sorted by name inside a file, as transformers writes."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in tensor_shapes(shape.config).items():
        length = _ITEM * math.prod(size)
        if files[-1] and filled + length > shape.shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = size
        filled += length
    return [dict(sorted(tensors.items())) for tensors in files]


def _write_file(path: str, tensors: dict[str, tuple[int, ...]], content: RandomBytes | None) -> None:
    """One safetensors file; without ``content`` its header and a hole."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + _ITEM * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if content is None:
            file.truncate(file.tell() + end)
        else:
            content.write(file.fileno(), end)
        os.fsync(file.fileno())


class RandomBytes:
    """Endless bfloat16 noise at the speed of memory.

    One block of normal numbers is drawn; each further block is that one with other low bits of the fractions: no two
    pages are equal, so that neither a compressing nor a deduplicating disk has it easier than with weights.
    """

    def __init__(self, seed: int, block_bytes: int = _BLOCK):
        self._generator = np.random.default_rng(seed)
        normal = self._generator.standard_normal(block_bytes // _ITEM, dtype=np.float32) * np.float32(0.02)
        # The upper half of a float32 is a bfloat16.
        self._base = (normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint64)
        self._block = np.empty_like(self._base)

    def write(self, descriptor: int, count: int) -> None:
        """Append ``count`` bytes to the file."""
        while count:
            # Seven bits of fraction in each of the four numbers of a word: exponents stay, so all remain finite.
            bits = self._generator.integers(0, 1 << 7, 4, dtype=np.uint16).view(np.uint64)[0]
            np.bitwise_xor(self._base, bits, out=self._block)
            view = memoryview(self._block).cast("B")[:count]
            count -= len(view)
            while view:
                view = view[os.write(descriptor, view) :]
