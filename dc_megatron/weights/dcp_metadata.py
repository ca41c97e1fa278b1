"""``.metadata`` of a torch.distributed.checkpoint tree: which tensors it holds, and which bytes of which file.

The file is a pickle that every other reader executes. Here it is read as data (safe_pickle.py) through a table of the
few classes that belong in it, and everything in it is checked: sizes, coverage of every tensor by its chunks, names and
places of files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from dc_megatron.weights import safe_pickle
from dc_megatron.weights.safe_pickle import Constructor, Instance, RefusedPickle
from dc_megatron.weights.torch_zip import DTYPES

METADATA = ".metadata"
# A 70B model with optimizer in 8 parts has about 4 MB.
LARGEST_METADATA = 64 << 20
_MOST_COMPARISONS = 20_000_000

_CLASSES = "torch.distributed.checkpoint.metadata."
_FILES = "torch.distributed.checkpoint.filesystem."
# Empty classes that megatron-core keeps for its older trees.
_MCORE = "megatron.core.dist_checkpointing.strategies.torch."
_METADATA_KINDS = (_CLASSES + "Metadata", _MCORE + "MCoreMetadata")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Bytes [start, start + length) of a file of the tree."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it begins in the tensor, its shape, and the archive that holds it."""

    offsets: Shape
    sizes: Shape
    region: Region


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its chunks, which cover it exactly."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def _sizes(value: object = ()) -> Shape:
    if not isinstance(value, tuple | list) or not all(type(part) is int and 0 <= part < 1 << 48 for part in value):
        raise RefusedPickle("a size in it is broken")
    return tuple(value)


_NAMES = {
    **safe_pickle.COMMON_NAMES,
    **DTYPES,
    ("torch", "Size"): Constructor("torch.Size", _sizes),
    ("torch.serialization", "_get_layout"): Constructor("torch.layout", str),
    **safe_pickle.inert(
        *(_CLASSES + name for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *(_CLASSES + name for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
        *(_CLASSES + "_MEM_FORMAT_ENCODING", _FILES + "_StorageInfo", _FILES + "_StoragePrefix"),
        *(_MCORE + "MCoreMetadata", _MCORE + "MCoreSavePlan", "pathlib.PosixPath", "pathlib.Path"),
        *("pathlib._local.PosixPath", "builtins.set"),
    ),
}


def parse_metadata(data: bytes) -> tuple[dict[str, StoredTensor], dict[str, Region]]:
    """Tensors and objects (entries of bytes) by key. RefusedPickle where the content is not allowed or not sound."""
    metadata = safe_pickle.load(data, _NAMES)
    if type(metadata) is not Instance or metadata.kind not in _METADATA_KINDS:
        raise RefusedPickle("it holds no Metadata of torch.distributed.checkpoint")
    entries, storage = metadata.field("state_dict_metadata"), metadata.field("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise RefusedPickle("its Metadata has no tables of entries and of storage")
    regions = _regions(storage)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Region] = {}
    for key, entry in entries.items():
        if not isinstance(key, str) or type(entry) is not Instance:
            raise RefusedPickle("an entry in it is broken")
        if entry.kind == _CLASSES + "BytesStorageMetadata":
            objects[key] = _take(regions, key, None)
        elif entry.kind == _CLASSES + "TensorStorageMetadata":
            tensors[key] = _tensor(key, entry, regions)
        else:
            raise RefusedPickle(f"its entry {key[:120]} is a {entry.kind}")
    if regions:
        raise RefusedPickle(f"it stores {next(iter(regions))[0][:120]}, of which it knows nothing else")
    return tensors, objects


def _regions(storage: dict) -> dict[tuple[str, Shape | None], Region]:
    regions = {}
    for index, info in storage.items():
        if _kind(index) != _CLASSES + "MetadataIndex" or _kind(info) != _FILES + "_StorageInfo":
            raise RefusedPickle("an entry of its storage is broken")
        key, offset = index.field("fqn"), index.field("offset")
        if not isinstance(key, str) or not (offset is None or isinstance(offset, tuple)):
            raise RefusedPickle("an entry of its storage is broken")
        place = (key, None if offset is None else _sizes(offset))
        if place in regions:
            raise RefusedPickle(f"it stores {key[:120]} twice")
        regions[place] = _region(key, info)
    return regions


def _region(key: str, info: Instance) -> Region:
    name, start, length = (info.field(field) for field in ("relative_path", "offset", "length"))
    # One plain name: nothing leads out of the folder, and no file of another meaning is read as a chunk.
    if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name or "\0" in name:
        raise RefusedPickle(f"{key[:120]} is said to lie in {name!r:.200}: files of the tree have plain names")
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise RefusedPickle(f"{key[:120]} is said to lie at offset {start!r:.40} in {length!r:.40} bytes")
    if info.field("transform_descriptors"):
        raise RefusedPickle(f"{key[:120]} is stored compressed or transformed, which is not supported here")
    return Region(name, start, length)


def _kind(value: object) -> str:
    return value.kind if type(value) is Instance else ""


def _take(regions: dict, key: str, offset: Shape | None) -> Region:
    region = regions.pop((key, offset), None)
    if region is None:
        raise RefusedPickle(f"{key[:120]} is stored nowhere" + (f" (chunk at {list(offset)})" if offset else ""))
    return region


def _tensor(key: str, entry: Instance, regions: dict) -> StoredTensor:
    properties, size, chunks = (entry.field(field) for field in ("properties", "size", "chunks"))
    state = properties.state if _kind(properties) == _CLASSES + "TensorProperties" else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(size, tuple) or not isinstance(chunks, list):
        raise RefusedPickle(f"{key[:120]} has no dtype, shape or chunks")
    shape = _sizes(size)
    found = []
    for chunk in chunks:
        if _kind(chunk) != _CLASSES + "ChunkStorageMetadata":
            raise RefusedPickle(f"a chunk of {key[:120]} is broken")
        offsets, sizes = _sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise RefusedPickle(f"a chunk of {key[:120]} has another number of dimensions than its shape {list(shape)}")
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise RefusedPickle(
                f"a chunk of {key[:120]} at {list(offsets)} of size {list(sizes)} lies outside its shape {list(shape)}"
            )
        found.append(Chunk(offsets, sizes, _take(regions, key, offsets)))
    _check_coverage(key, shape, found)
    return StoredTensor(shape, dtype, tuple(found))


def _check_coverage(key: str, shape: Shape, chunks: list[Chunk]) -> None:
    """No overlap and the tensor's volume: then the chunks, which lie inside it, cover it exactly."""
    volume = sum(math.prod(chunk.sizes) for chunk in chunks)
    if volume != math.prod(shape):
        raise RefusedPickle(
            f"the chunks of {key[:120]} hold {volume} elements; its shape {list(shape)} has {math.prod(shape)}"
        )
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if not _is_grid(filled) and any(_overlap(one, other) for one, other in _neighbours(key, filled)):
        raise RefusedPickle(f"chunks of {key[:120]} overlap")


def _is_grid(chunks: list[Chunk]) -> bool:
    """Whether the chunks are distinct cells of a grid, as parallel layouts make them: such cells do not overlap."""
    if not chunks:
        return True
    for dimension in range(len(chunks[0].sizes)):
        ranges = sorted({(chunk.offsets[dimension], chunk.sizes[dimension]) for chunk in chunks})
        if any(start + size > following for (start, size), (following, _) in pairwise(ranges)):
            return False
    return len({chunk.offsets for chunk in chunks}) == len(chunks)


def _neighbours(key: str, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Chunk]]:
    """Pairs that share rows of the first dimension."""
    comparisons = 0
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        active = [other for other in active if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
        comparisons += len(active)
        if comparisons > _MOST_COMPARISONS:
            raise RefusedPickle(f"{key[:120]} is divided too irregularly to be checked")
        yield from ((other, chunk) for other in active)
        active.append(chunk)


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        first < second + second_size and second < first + first_size
        for first, first_size, second, second_size in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )
