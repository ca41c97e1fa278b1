"""Whether two folders hold the same model, whatever their formats: names, shapes, dtypes, every bit, and settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dc_megatron.config import read_json_file
from dc_megatron.errors import UserError
from dc_megatron.weights.block_stream import BLOCK_BYTES, Block, read_ahead, split_rows
from dc_megatron.weights.compared_settings import differing_settings, differing_stock_settings
from dc_megatron.weights.exporter import open_any, plan_export
from dc_megatron.weights.hf_llava_format import HF_LLAVA_TYPES, stock_image_token
from dc_megatron.weights.language_tables import EMBEDDING, HEADS
from dc_megatron.weights.megatron_folder import is_checkpoint
from dc_megatron.weights.model_parts import ModelFolder, tower_of
from dc_megatron.weights.progress import Progress
from dc_megatron.weights.safetensors_files import open_checkpoint
from dc_megatron.weights.tensor_reader import Merged, Renamed, TensorReader, num_bytes


@dataclass
class Comparison:
    """``differences``: one line each, of settings before tensors. ``notes``: what was left out or is on one side."""

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
    llava-hf folder is compared with the export of the other side, which folds the connector as the export did; with a
    language model alone, its own language model is compared. UserError: a folder that cannot be opened, a ``step``
    where neither is a checkpoint.
    """
    if step is not None and not (is_checkpoint(a) or is_checkpoint(b)):
        raise UserError(f"--step {step}: neither {a} nor {b} is a checkpoint of training")

    def model_of(folder: str, flag: str) -> ModelFolder:
        return open_any(folder, step if is_checkpoint(folder) else None, vision_tower, flag)[0]

    result = Comparison()
    stock = [_is_stock(a), _is_stock(b)]
    models = [None if is_stock else model_of(*side) for is_stock, side in zip(stock, ((a, "A"), (b, "B")), strict=True)]
    if any(model and not model.has_projector for model in models):
        # Stock Llava cannot say a language model alone: what both have is compared under text names.
        stock = [False, False]
        models = [model or model_of(*side) for model, side in zip(models, ((a, "A"), (b, "B")), strict=True)]
    if any(stock):
        one, other = _as_stock(models, (a, b), result)
    else:
        one, other = _common(*models, result)
    _compare(one, other, any_dtype, result, progress)
    return result


def _is_stock(folder: str) -> bool:
    if is_checkpoint(folder) or not os.path.isfile(os.path.join(folder, "config.json")):
        return False
    config = read_json_file(folder, "config.json", folder)
    return config.get("model_type") in HF_LLAVA_TYPES and "mm_vision_tower" not in config


def _as_stock(
    models: list[ModelFolder | None], folders: tuple[str, str], result: Comparison
) -> tuple[TensorReader, TensorReader]:
    """What two folders hold of which one or both (None among ``models``) are stock; a model is taken as its export."""
    whats = [f"{side} {folder}" for side, folder in zip("AB", folders, strict=True)]
    sides: dict[int, tuple[TensorReader, dict]] = {}
    for number, model in enumerate(models):
        if model is None:
            config = read_json_file(folders[number], "config.json", whats[number])
            sides[number] = open_checkpoint(folders[number], "AB"[number]), config
    for number, model in enumerate(models):
        if model is not None:
            sides[number] = _planned(model, *sides[1 - number], whats[1 - number])
    result.differences += differing_stock_settings(sides[0][1], sides[1][1], *whats)
    return sides[0][0], sides[1][0]


def _planned(model: ModelFolder, stored: TensorReader, config: dict, what: str) -> tuple[TensorReader, dict]:
    """``model`` as the export that a stock folder with ``stored`` and ``config`` would be of it."""
    embedding = next((name for name in stored.names() if name.endswith(EMBEDDING.removeprefix("model."))), None)
    if embedding is None:
        raise UserError(f"{what}: holds no embedding of a language model; it is no whole Llava folder")
    rows = max(stored.shape(embedding)[0], model.language.vocab_size)
    image_token = (stock_image_token(config), rows)
    export = plan_export(model, "hf-llava", stored.dtype(embedding), modeling_code=True, image_token=image_token)
    return export.tensors, export.config


def _common(a: ModelFolder, b: ModelFolder, result: Comparison) -> tuple[TensorReader, TensorReader]:
    """Both models' tensors; a tower that lies beside one of them is part of it where the other has one inside."""
    result.differences += differing_settings(a, b)
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
    return Renamed(reader, {n: n for n in reader.names() if n.startswith("model.") or n in HEADS})


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
