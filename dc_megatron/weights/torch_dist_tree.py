"""Megatron's ``torch_dist`` tree (``.metadata``, ``metadata.json``, ``*.distcp``), read without Megatron and safely.

Nothing in it is executed: pickles are read as data, and every place that they name is checked before it is read. A
chunk is an archive of torch.save in a region of a file; its bytes are read in place, so memory does not grow with it.
"""

from __future__ import annotations

import json
import math
import os

import torch
from torch import Tensor

from dc_megatron.errors import UserError
from dc_megatron.weights import dcp_metadata, torch_zip, tree_objects
from dc_megatron.weights.dcp_metadata import METADATA, Chunk, Region, StoredTensor
from dc_megatron.weights.positioned_reads import PositionedFile
from dc_megatron.weights.safe_pickle import RefusedPickle
from dc_megatron.weights.torch_zip import Archive, BrokenArchive, TensorPlace

CONFIG = "metadata.json"
LEGACY_COMMON = "common.pt"
COMMON_STATE = "common_state/shard_0_1"
_LAYER = "{layer}"
# Columns of a wider tensor are read into memory of this size, then copied to their place.
_BLOCK_BYTES = 16 << 20
_FLOAT8 = tuple(value for value in vars(torch).values() if isinstance(value, torch.dtype) and "float8" in str(value))
_SAVE_AGAIN = "save it again with --ckpt-format torch_dist"


class TorchDistTree:
    """The tensors of one iteration's folder. Keys may hold ``{layer}``; both ways to store layers are understood:
    one stacked tensor ``...layers.mlp.linear_fc1.weight`` [L, ...], or ``...layers.3.mlp.linear_fc1.weight`` for each.

    ``tensors``: key as stored -> StoredTensor (shape, dtype, chunks). ``objects``: key -> place of other entries.
    UserError: not such a tree, or one whose metadata are unsafe, broken or do not fit the files.
    """

    def __init__(self, folder: str, flag: str = "--load"):
        self.folder, self._what = folder, f"{flag} {folder}"
        _refuse_other_kinds(folder, self._what)
        path = _inside(folder, METADATA, self._what)
        try:
            self.tensors, self.objects = dcp_metadata.parse_metadata(_read_metadata(path))
        except RefusedPickle as error:
            raise self._refused(error) from None
        _refuse_fp8(self.tensors, self._what)
        self._files = self._open_files()
        self._numbers = {name: number for number, name in enumerate(sorted(self._files))}
        self._places: dict[Region, TensorPlace] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def has(self, key: str) -> bool:
        """Whether the tensor is there; of a key with ``{layer}`` at least the first layer."""
        return _stacked(key) in self.tensors or key.format(layer=0) in self.tensors

    def num_layers(self, key: str) -> int:
        """How many layers a key with ``{layer}`` has, without gaps from 0 on."""
        if _stacked(key) in self.tensors:
            return self.tensors[_stacked(key)].shape[0]
        count = 0
        while key.format(layer=count) in self.tensors:
            count += 1
        return count

    def shape(self, key: str, layer: int | None = None) -> tuple[int, ...]:
        """Shape of the tensor, of one layer where ``key`` holds ``{layer}``."""
        tensor, index = self._find(key, layer)
        return tensor.shape if index is None else tensor.shape[1:]

    def dtype(self, key: str, layer: int | None = 0) -> torch.dtype:
        """dtype as stored."""
        return self._find(key, layer if _LAYER in key else None)[0].dtype

    def position(self, key: str, layer: int | None = None) -> tuple[int, int]:
        """(number of the file, byte offset) of the tensor's first chunk: sorting by it gives the order on disk."""
        tensor, index = self._find(key, layer)
        chunk = min((chunk for chunk in tensor.chunks if _holds(chunk, index)), key=lambda chunk: chunk.offsets)
        within = 0 if index is None else (index - chunk.offsets[0]) * math.prod(chunk.sizes[1:]) * tensor.dtype.itemsize
        return self._numbers[chunk.region.file], chunk.region.start + within

    def read_rows(self, key: str, layer: int | None, start: int, end: int, out: Tensor) -> None:
        """Fill ``out``, [end - start, ...] contiguous in the stored dtype on the CPU, with rows start to end.

        Every byte needed is read once, from whichever chunks hold it. UserError where a chunk is broken.
        """
        tensor, index = self._find(key, layer)
        shape = tensor.shape if index is None else tensor.shape[1:]
        assert 0 <= start <= end <= shape[0], f"{key}: rows {start} to {end} of {shape[0]}"
        assert out.shape == (end - start, *shape[1:]), f"{key}: rows into a buffer of {tuple(out.shape)}"
        assert out.dtype == tensor.dtype, f"{key}: {tensor.dtype} into a buffer of {out.dtype}"
        for chunk in tensor.chunks:
            if _holds(chunk, index):
                self._copy_chunk(key, tensor, chunk, index, (start, end), out)

    def read_object(self, key: str) -> object:
        """An entry of ``objects``: plain values as they are, tensors as TensorPlace, all else as inert Instance."""
        region = self.objects[key]
        try:
            return tree_objects.load_object(self._archive(region))
        except (BrokenArchive, EOFError, OSError) as error:
            raise self._broken(key, region, error) from None

    def common_state(self) -> dict:
        """What is stored once for all ranks: iteration, checkpoint_version and the like; {} where there is nothing."""
        path = os.path.join(self.folder, LEGACY_COMMON)
        if os.path.lexists(path):
            return _read_legacy_common(self.folder, self._what)
        content = self.read_object(COMMON_STATE) if COMMON_STATE in self.objects else {}
        # An object that is stored in shards comes as the list of them.
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
        return content if isinstance(content, dict) else {}

    def check(self) -> None:
        """Look into every chunk and object without reading payloads: UserError names what is broken or unsafe."""
        if os.path.lexists(os.path.join(self.folder, LEGACY_COMMON)):
            _read_legacy_common(self.folder, self._what)
        for key, region in self.objects.items():
            try:
                archive = self._archive(region)
                if "_extra_state" in key:
                    tree_objects.check_extra_state(archive, self._files[region.file].read)
                else:
                    tree_objects.load_object(archive)
            except (BrokenArchive, EOFError, OSError) as error:
                raise self._broken(key, region, error) from None
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                self._place(key, tensor, chunk)

    def _find(self, key: str, layer: int | None) -> tuple[StoredTensor, int | None]:
        """The tensor as stored, and the index of the layer in it where layers are stacked."""
        assert (layer is not None) == (_LAYER in key), f"{key} with layer {layer}"
        if layer is None:
            return self.tensors[key], None
        stacked = self.tensors.get(_stacked(key))
        if stacked is None:
            return self.tensors[key.format(layer=layer)], None
        assert 0 <= layer < stacked.shape[0], f"{key}: layer {layer} of {stacked.shape[0]}"
        return stacked, layer

    def _copy_chunk(
        self, key: str, tensor: StoredTensor, chunk: Chunk, layer: int | None, rows: tuple[int, int], out: Tensor
    ) -> None:
        """Copy what ``chunk`` holds of rows (of one layer) to its place in ``out``."""
        first = 0 if layer is None else 1
        start = max(rows[0], chunk.offsets[first])
        end = min(rows[1], chunk.offsets[first] + chunk.sizes[first])
        if start >= end or not math.prod(chunk.sizes):
            return
        place = self._place(key, tensor, chunk)
        if layer is not None:
            place = place.select(layer - chunk.offsets[0])
        target = out[start - rows[0] : end - rows[0]]
        inner = chunk.sizes[first + 1 :]
        for dimension, (offset, size) in enumerate(zip(chunk.offsets[first + 1 :], inner, strict=True), start=1):
            target = target.narrow(dimension, offset, size)
        start, end = start - chunk.offsets[first], end - chunk.offsets[first]
        try:
            _read_rows(self._files[chunk.region.file], place, start, end, target)
        except (EOFError, OSError) as error:
            raise self._broken(key, chunk.region, error) from None

    def _place(self, key: str, tensor: StoredTensor, chunk: Chunk) -> TensorPlace:
        """Where the chunk's elements lie, checked against the metadata on its first use."""
        place = self._places.get(chunk.region)
        if place is None:
            region = chunk.region
            try:
                place = torch_zip.find_tensor(self._files[region.file], region.start, region.length)
            except (BrokenArchive, EOFError, OSError) as error:
                raise self._broken(key, region, error) from None
            if place.shape != chunk.sizes or place.dtype != tensor.dtype:
                found = f"it holds {list(place.shape)} of {place.dtype}"
                expected = f"{METADATA} says {list(chunk.sizes)} of {tensor.dtype}"
                raise self._broken(key, region, f"is not what was announced: {found}, {expected}")
            self._places[region] = place
        return place

    def _archive(self, region: Region) -> Archive:
        return Archive(self._files[region.file], region.start, region.length)

    def _broken(self, key: str, region: Region, reason: object) -> UserError:
        return UserError(
            f"{self._what}: {os.path.join(self.folder, region.file)} at byte {region.start}: {key[:120]} {reason};"
            " fetch the checkpoint again"
        )

    def _refused(self, reason: object) -> UserError:
        path = os.path.join(self.folder, METADATA)
        return UserError(f"{self._what}: {path} is refused: {reason}; fetch the checkpoint again")

    def _open_files(self) -> dict[str, PositionedFile]:
        """Every file that the metadata name, by name; what they say must fit into it, without overlap."""
        regions: dict[str, list[Region]] = {}
        for region in (*self.objects.values(), *(c.region for t in self.tensors.values() for c in t.chunks)):
            regions.setdefault(region.file, []).append(region)
        files = {}
        for name, parts in regions.items():
            path = _inside(self.folder, name, self._what)
            files[name] = PositionedFile(path)
            end = 0
            for region in sorted(parts, key=lambda region: (region.start, region.length)):
                if region.start < end:
                    raise self._refused(f"it names byte {region.start} of {name} twice")
                end = region.start + region.length
            if end > files[name].size:
                raise UserError(
                    f"{self._what}: {path} has {files[name].size} bytes, {METADATA} asks for {end}: truncated; fetch it"
                    " again"
                )
        return files


def check_tree(folder: str, flag: str = "--load") -> None:
    """UserError where the tree is of another kind, unsafe, broken or incomplete: call it before Megatron reads it.

    Metadata, objects and the headers of all chunks are read, payloads are not: those are the manifest's hashes' matter.
    """
    TorchDistTree(folder, flag).check()


def _read_rows(file: PositionedFile, place: TensorPlace, start: int, end: int, target: Tensor) -> None:
    """Rows of a chunk into ``target``, which may be some columns of a wider tensor."""
    if target.is_contiguous():
        torch_zip.read_rows(file, place, start, end, target)
        return
    # What is not contiguous on file is read as a whole each time: at once then.
    count = max(1, _BLOCK_BYTES // max(1, place.row_bytes)) if place.contiguous else end - start
    scratch = torch.empty(min(count, end - start), *place.shape[1:], dtype=place.dtype)
    for first in range(start, end, count):
        last = min(first + count, end)
        torch_zip.read_rows(file, place, first, last, scratch[: last - first])
        target[first - start : last - start] = scratch[: last - first]


def _stacked(key: str) -> str:
    return key.replace(_LAYER + ".", "")


def _holds(chunk: Chunk, layer: int | None) -> bool:
    return layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]


def _inside(folder: str, name: str, what: str) -> str:
    """The path of a file of the tree; UserError where it is missing, or a link that leads out of the folder."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise UserError(f"{what}: {path} is missing; fetch the checkpoint again")
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise UserError(f"{what}: {path} is a link to {os.path.realpath(path)}, outside the checkpoint; copy the file")
    return path


def _read_metadata(path: str) -> bytes:
    size = os.path.getsize(path)
    if size > dcp_metadata.LARGEST_METADATA:
        raise RefusedPickle(f"it has {size} bytes, more than {dcp_metadata.LARGEST_METADATA}")
    with open(path, "rb") as file:
        return file.read()


def _refuse_other_kinds(folder: str, what: str) -> None:
    """Name what ``folder`` is where it is a checkpoint of Megatron of another kind."""
    if not os.path.isdir(folder):
        raise UserError(f"{what}: no such folder")
    names = os.listdir(folder)
    if any(name.startswith("mp_rank_") for name in names):
        raise UserError(
            f"{what}: a legacy Megatron checkpoint (mp_rank_XX folders, --ckpt-format torch), which is not read here:"
            f" load it with the Megatron that wrote it and {_SAVE_AGAIN}"
        )
    if CONFIG not in names:
        if METADATA in names:
            raise UserError(
                f"{what}: has {METADATA} but no {CONFIG}: a tree of Megatron FSDP (fsdp_dtensor) or of torch_dcp, or an"
                f" incomplete copy; in the first case {_SAVE_AGAIN}"
            )
        raise UserError(f"{what}: no Megatron checkpoint: it has neither {METADATA} nor {CONFIG}")
    path = _inside(folder, CONFIG, what)
    try:
        with open(path, "rb") as file:
            backend = json.loads(file.read(1 << 20))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{what}: {path} is broken or names no sharded_backend; fetch the checkpoint again") from None
    if backend != "torch_dist":
        raise UserError(f"{what}: {path} says sharded_backend {backend!r:.40}; only torch_dist is read: {_SAVE_AGAIN}")


def _refuse_fp8(tensors: dict[str, StoredTensor], what: str) -> None:
    for key, tensor in tensors.items():
        if key.startswith(("language_model.", "model.")) and tensor.dtype in (torch.uint8, *_FLOAT8):
            raise UserError(
                f"{what}: {key} is stored as {tensor.dtype}: a checkpoint with FP8 primary weights"
                f" (--fp8-param-gather), which is not read here: load it with the run that wrote it and {_SAVE_AGAIN}"
                " without that flag"
            )


def _read_legacy_common(folder: str, what: str) -> dict:
    """The common state of trees before megatron-core 0.16, by the same names as any object. Megatron prefers the file
    to what lies in the tree, so one that does not pass is refused even where the tree has its own."""
    path = _inside(folder, LEGACY_COMMON, what)
    try:
        content = tree_objects.load_object(Archive(PositionedFile(path)))
    except (BrokenArchive, EOFError, OSError) as error:
        raise UserError(f"{what}: {path} {error}; remove the file if you do not trust its origin") from None
    return content if isinstance(content, dict) else {}
