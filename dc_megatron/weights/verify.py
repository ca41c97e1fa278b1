"""Whether two folders hold the same model: names, shapes, dtypes and every bit, whatever their formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dc_megatron.config import read_json_file
from dc_megatron.weights.block_stream import BLOCK_BYTES, Block, read_ahead, split_rows
from dc_megatron.weights.exporter import open_any, plan_export
from dc_megatron.weights.hf_llava_format import HF_LLAVA_TYPES
from dc_megatron.weights.language_tables import HEAD
from dc_megatron.weights.megatron_folder import is_checkpoint
from dc_megatron.weights.model_parts import ModelFolder, tower_of
from dc_megatron.weights.progress import Progress
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import Merged, Renamed, TensorReader, num_bytes


@dataclass
class Comparison:
    """``differences``: one line each. ``notes``: what was left out or holds more on one side."""

    tensors: int = 0
    num_bytes: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences


def verify(
    a: str,
    b: str,
    *,
    step: int | None = None,
    vision_tower: str = "",
    any_dtype: bool = False,
    progress: Callable[[str, int], Progress] = Progress,
) -> Comparison:
    """Compare the models in ``a`` and ``b``. Parts that only one format can hold are named in the notes.

    ``any_dtype``: where dtypes differ, ``a`` is cast to ``b``'s first; otherwise that is a difference. A stock
    llava-hf folder is compared with the export of the other side, which folds the connector as the export did.
    """

    def model_of(folder: str, flag: str) -> ModelFolder:
        return open_any(folder, step if is_checkpoint(folder) else None, vision_tower, flag)[0]

    result = Comparison()
    if _is_stock(a) and _is_stock(b):
        one, other = open_checkpoint(a, "A"), open_checkpoint(b, "B")
    elif _is_stock(b):
        one, other = _as_stock(model_of(a, "A"), b)
    elif _is_stock(a):
        other, one = _as_stock(model_of(b, "B"), a)
    else:
        one, other = _common(model_of(a, "A"), model_of(b, "B"), result)
    _compare(one, other, any_dtype, result, progress)
    return result


def _is_stock(folder: str) -> bool:
    if is_checkpoint(folder) or not os.path.isfile(os.path.join(folder, "config.json")):
        return False
    config = read_json_file(folder, "config.json", folder)
    return config.get("model_type") in HF_LLAVA_TYPES and "mm_vision_tower" not in config


def _as_stock(model: ModelFolder, folder: str) -> tuple[TensorReader, TensorReader]:
    """``model`` as the export that ``folder`` would be of it, and what ``folder`` holds."""
    stored = open_checkpoint(folder, "B")
    config = read_json_file(folder, "config.json", folder)
    image_token = (config.get("image_token_index", config.get("image_token_id")), config["text_config"]["vocab_size"])
    kind = stored.dtype(stored.names()[0])
    return plan_export(model, "hf-llava", kind, modeling_code=True, image_token=image_token).tensors, stored


def _common(a: ModelFolder, b: ModelFolder, result: Comparison) -> tuple[TensorReader, TensorReader]:
    """Both models' tensors; a tower that lies beside one of them is part of it where the other has one inside."""
    readers = [a.reader, b.reader]
    for number, (model, other) in enumerate(((a, b), (b, a))):
        if other.has_tower and not model.has_tower and model.tower_folder:
            readers[number] = Merged([model.reader, tower_of(model)])
    for model, other in ((a, b), (b, a)):
        for what, has in (("projector", "has_projector"), ("vision tower", "has_tower")):
            if getattr(model, has) and other.kind == "hf":
                result.notes.append(f"{model.path}: the {what} is not compared, {other.path} is a text model")
    if "hf" in (a.kind, b.kind):
        readers = [_text_only(reader) for reader in readers]
    return readers[0], readers[1]


def _text_only(reader: TensorReader) -> TensorReader:
    return Renamed(reader, {n: n for n in reader.names() if n.startswith("model.") or n == HEAD})


def _compare(a: TensorReader, b: TensorReader, any_dtype: bool, result: Comparison, progress) -> None:
    names_a, names_b = set(a.names()), set(b.names())
    result.differences += [f"{name}: only in A" for name in sorted(names_a - names_b)]
    result.differences += [f"{name}: only in B" for name in sorted(names_b - names_a)]
    common = sorted(names_a & names_b, key=b.position)
    bar = progress("verify", sum(num_bytes(b, name) for name in common))
    for name in common:
        _compare_tensor(a, b, name, any_dtype, result, bar)
    bar.finish()


def _compare_tensor(a: TensorReader, b: TensorReader, name: str, any_dtype: bool, result: Comparison, bar) -> None:
    result.tensors += 1
    result.num_bytes += num_bytes(b, name)
    shape_a, shape_b = a.shape(name), b.shape(name)
    if shape_a != shape_b:
        result.differences.append(f"{name}: shape {list(shape_a)} in A, {list(shape_b)} in B")
        return
    kinds = [str(reader.dtype(name)).removeprefix("torch.") for reader in (a, b)]
    if kinds[0] != kinds[1] and not any_dtype:
        result.differences.append(f"{name}: dtype {kinds[0]} in A, {kinds[1]} in B")
    differing, largest = _count_differing(a, b, name, bar)
    if differing:
        cast = f" after the cast to {kinds[1]}" if kinds[0] != kinds[1] else ""
        result.differences.append(f"{name}: {differing} values differ{cast}, by {largest:.3g} at most")


def _count_differing(a: TensorReader, b: TensorReader, name: str, bar) -> tuple[int, float]:
    """(number of elements that are not the same bits, largest absolute difference)."""
    shape, kind = b.shape(name), b.dtype(name)
    other = torch.empty(0)
    differing, largest = 0, 0.0

    def read(start: int, end: int, out: Tensor) -> None:
        b.read_rows(name, start, end, out)

    ranges = split_rows(shape, max(kind, a.dtype(name), key=lambda dtype: dtype.itemsize), BLOCK_BYTES // 2)
    for block, mine in read_ahead(Block(read, shape, kind, *bounds) for bounds in ranges):
        if other.dtype != a.dtype(name) or other.shape != mine.shape:
            other = torch.empty(mine.shape, dtype=a.dtype(name))
        a.read_rows(name, block.start, block.end, other)
        theirs = other.to(kind)
        if not torch.equal(theirs.view(torch.uint8), mine.view(torch.uint8)):
            width = kind.itemsize
            bits = (theirs.view(torch.uint8) != mine.view(torch.uint8)).view(-1, width).any(dim=1)
            differing += int(bits.sum())
            largest = max(largest, (theirs.double() - mine.double()).abs().max().item())
        bar(block.num_bytes)
    return differing, largest
