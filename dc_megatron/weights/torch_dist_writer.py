"""Megatron's ``torch_dist`` tree, written in one process without Megatron and without the model in memory.

The payload of each chunk is what ``torch.save`` makes of it and ``.metadata`` consists of torch's own dataclasses, so
torch's reader is the judge of both. torch's FileSystemWriter is not used: it holds all chunks of a key at once, and
cannot hash, take up a file where an earlier attempt stopped, or follow the order in which the source lies on disk.
"""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dc_megatron.weights.block_stream import Block, read_ahead, split_rows
from dc_megatron.weights.durable_files import Digest, HashedFile, PartialFolder

_FILE_BYTES = 4_000_000_000
# The zip archive around a chunk: headers, a small pickle and padding; seen 1.2 kB.
_ARCHIVE_BYTES = 2048


@dataclass(frozen=True)
class Part:
    """One layer of a stacked tensor, or a whole tensor (``layer`` None).

    ``read(start, end, out)`` fills rows in; ``position`` sorts parts into the order in which their sources lie on disk.
    """

    layer: int | None
    read: Callable[[int, int, torch.Tensor], None]
    position: tuple


@dataclass(frozen=True)
class TreeTensor:
    """A tensor of the tree. ``shape`` includes the dimension of stacked layers, if ``parts`` have layers."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def part_shape(self) -> tuple[int, ...]:
        return self.shape if self.parts[0].layer is None else self.shape[1:]


@dataclass(frozen=True)
class _Chunk:
    tensor: TreeTensor
    part: Part
    start: int
    end: int

    @property
    def offsets(self) -> torch.Size:
        lead = () if self.part.layer is None else (self.part.layer,)
        return torch.Size((*lead, self.start, *(0 for _ in self.tensor.part_shape[1:])))

    @property
    def sizes(self) -> torch.Size:
        lead = () if self.part.layer is None else (1,)
        return torch.Size((*lead, self.end - self.start, *self.tensor.part_shape[1:]))

    @property
    def block(self) -> Block:
        return Block(self.part.read, self.tensor.part_shape, self.tensor.dtype, self.start, self.end)


class TorchDistWriter:
    """Writes ``tensors`` and ``objects`` (name -> value that a weights-only torch.load accepts) below ``folder``."""

    def __init__(self, tensors: Sequence[TreeTensor], objects: Mapping[str, object], folder: str = ""):
        self._tensors, self._objects, self._folder = tensors, dict(objects), folder
        self._files = self._divide()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, near enough to ask whether the disk has room."""
        chunks = sum(len(file) for file in self._files)
        return sum(tensor.num_bytes for tensor in self._tensors) + (chunks + len(self._objects)) * 2 * _ARCHIVE_BYTES

    def write(self, partial: PartialFolder, progress: Callable[[int], None]) -> dict[str, Digest]:
        """Write what is not finished yet; returns the digests of all files, by name below ``folder``."""
        with _no_checksums():
            for number, chunks in enumerate(self._files):
                path = self._path(number)
                if path in partial.finished:
                    progress(sum(chunk.block.num_bytes for chunk in chunks))
                else:
                    self._write_file(partial, path, chunks, progress)
            self._write_objects(partial)
        names = [self._path(number) for number in range(len(self._files) + 1)]
        if self._folder + ".metadata" not in partial.finished:
            partial.write(self._folder + ".metadata", self._metadata(partial.notes))
        if self._folder + "metadata.json" not in partial.finished:
            partial.write(self._folder + "metadata.json", _backend())
        names += [self._folder + ".metadata", self._folder + "metadata.json"]
        return {name.removeprefix(self._folder): partial.finished[name] for name in names}

    def _path(self, number: int) -> str:
        """Named as Megatron's rank 0 names the files of its writers. The last one holds the objects."""
        return f"{self._folder}__0_{number}.distcp"

    def _divide(self) -> list[list[_Chunk]]:
        """Chunks by file, in the order in which their sources lie on disk."""
        chunks = []
        for tensor in self._tensors:
            for part in tensor.parts:
                for start, end in split_rows(tensor.part_shape, tensor.dtype):
                    chunks.append(_Chunk(tensor, part, start, end))
        chunks.sort(key=lambda chunk: (chunk.part.position, chunk.start))
        files: list[list[_Chunk]] = []
        room = 0
        for chunk in chunks:
            if chunk.block.num_bytes > room:
                files.append([])
                room = _FILE_BYTES
            files[-1].append(chunk)
            room -= chunk.block.num_bytes
        return files

    def _write_file(self, partial: PartialFolder, path: str, chunks: list[_Chunk], progress) -> None:
        lengths = []
        with partial.create(path) as file:
            by_block = iter(chunks)
            for block, content in read_ahead(chunk.block for chunk in chunks):
                lengths.append(_append(file, content.view(next(by_block).sizes)))
                progress(block.num_bytes)
            partial.record(path, file.finish(), lengths)

    def _write_objects(self, partial: PartialFolder) -> None:
        path = self._path(len(self._files))
        if path not in partial.finished:
            with partial.create(path) as file:
                lengths = [_append(file, value) for value in self._objects.values()]
                partial.record(path, file.finish(), lengths)

    def _metadata(self, lengths: Mapping[str, list[int]]) -> bytes:
        """``.metadata``: keys, shapes, and where each chunk lies, from the lengths noted when it was written."""
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for number, chunks in enumerate(self._files):
            places = _places(self._path(number).removeprefix(self._folder), lengths[self._path(number)])
            for chunk, place in zip(chunks, places, strict=True):
                storage[MetadataIndex(chunk.tensor.key, chunk.offsets)] = place
        objects = self._path(len(self._files))
        places = _places(objects.removeprefix(self._folder), lengths[objects])
        for name, place in zip(self._objects, places, strict=True):
            storage[MetadataIndex(name)] = place
        entries: dict = {tensor.key: self._tensor_metadata(tensor) for tensor in self._tensors}
        entries |= {name: BytesStorageMetadata() for name in self._objects}
        metadata = Metadata(
            state_dict_metadata=entries,
            storage_data=storage,
            # Not the path: the folder gets another name when it is whole.
            storage_meta=StorageMeta(checkpoint_id="release", save_id=str(uuid.uuid4())),
        )
        return pickle.dumps(metadata)

    def _tensor_metadata(self, tensor: TreeTensor) -> TensorStorageMetadata:
        ranges = split_rows(tensor.part_shape, tensor.dtype)
        chunks = [_Chunk(tensor, part, start, end) for part in tensor.parts for start, end in ranges]
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.shape),
            chunks=[ChunkStorageMetadata(chunk.offsets, chunk.sizes) for chunk in chunks],
        )


class _no_checksums:
    """torch.save without the CRC32 of every record, which costs more than everything else; the file is hashed."""

    def __enter__(self) -> None:
        self._before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)

    def __exit__(self, *exception) -> None:
        torch.serialization.set_crc32_options(self._before)


def _append(file: HashedFile, value: object) -> int:
    """The archive of ``value`` at the end of ``file``; returns its length."""
    before = file.size
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # torch's archive complains about its position after a write has failed; the write's own error is the reason.
        raise error.__context__ or error from None
    return file.size - before


def _places(file_name: str, lengths: Sequence[int]) -> Iterator[_StorageInfo]:
    offset = 0
    for length in lengths:
        yield _StorageInfo(file_name, offset, length)
        offset += length


def _backend() -> bytes:
    return json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()
