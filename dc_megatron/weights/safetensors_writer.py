"""Safetensors files written from a ``TensorReader`` in blocks, in shards with an index as transformers has them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dc_megatron.errors import UserError
from dc_megatron.weights.block_stream import Block, read_ahead, row_bytes, split_rows
from dc_megatron.weights.durable_files import PartialFolder
from dc_megatron.weights.tensor_reader import TensorReader

SHARD_BYTES = 5_000_000_000
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Shard:
    """One file: its name, its tensors in order, and the bytes of those."""

    file_name: str
    names: tuple[str, ...]
    num_bytes: int


class SafetensorsWriter:
    """Writes all tensors of ``reader``, in its order of names, below ``folder`` of a PartialFolder.

    ``dtype``: that of the result, None keeps each tensor's. ``most`` bytes go into a shard (a tensor is never split);
    ``one_file``: name of the one file that all go into instead.
    """

    def __init__(
        self,
        reader: TensorReader,
        dtype: torch.dtype | None = None,
        folder: str = "",
        most: int = SHARD_BYTES,
        one_file: str = "",
    ):
        self._reader, self._dtype, self._folder = reader, dtype, folder
        self._shards = self._divide(sys.maxsize if one_file else most, one_file or "model.safetensors")

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, near enough to ask whether the disk has room."""
        return sum(shard.num_bytes + 200 * len(shard.names) for shard in self._shards)

    def write(self, partial: PartialFolder, progress: Callable[[int], None]) -> None:
        """Write what is not finished yet; ``progress`` is told the bytes of every block.

        UserError where a cast to fp16 would make infinities.
        """
        for shard in self._shards:
            path = self._folder + shard.file_name
            if path in partial.finished:
                progress(shard.num_bytes)
                continue
            with partial.create(path) as file:
                file.write(self._header(shard))
                names = (name for name, _ in self._blocks(shard))
                for block, tensor in read_ahead(block for _, block in self._blocks(shard)):
                    name = next(names)
                    kind = self._dtype_of_result(block.dtype)
                    content = tensor if kind == block.dtype else tensor.to(kind)
                    if self._dtype is torch.float16 and not torch.isfinite(content).all():
                        raise UserError(f"--dtype fp16: {name} holds values that fp16 has not (above 65504); take bf16")
                    progress(file.write(content.view(torch.uint8).flatten().numpy()))
                partial.record(path, file.finish())
        if len(self._shards) > 1:
            partial.write(self._folder + "model.safetensors.index.json", self._index())

    def _dtype_of_result(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _size(self, name: str) -> int:
        shape, dtype = self._reader.shape(name), self._dtype_of_result(self._reader.dtype(name))
        return shape[0] * row_bytes(shape, dtype)

    def _divide(self, most: int, single: str) -> list[Shard]:
        groups: list[list[str]] = [[]]
        sizes = [0]
        for name in self._reader.names():
            size = self._size(name)
            if groups[-1] and sizes[-1] + size > most:
                groups.append([])
                sizes.append(0)
            groups[-1].append(name)
            sizes[-1] += size
        count = len(groups)
        names = [single]
        if count > 1:
            names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        return [Shard(name, self._aligned(group), size) for name, group, size in zip(names, groups, sizes, strict=True)]

    def _aligned(self, names: list[str]) -> tuple[str, ...]:
        """Wide elements first, so that each tensor begins at a multiple of its element's size, as readers ask for."""
        return tuple(sorted(names, key=lambda name: -self._dtype_of_result(self._reader.dtype(name)).itemsize))

    def _header(self, shard: Shard) -> bytes:
        entries: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in shard.names:
            start, end = end, end + self._size(name)
            dtype = self._dtype_of_result(self._reader.dtype(name))
            shape = list(self._reader.shape(name))
            entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _blocks(self, shard: Shard) -> Iterator[tuple[str, Block]]:
        for name in shard.names:
            shape, dtype = self._reader.shape(name), self._reader.dtype(name)
            for start, end in split_rows(shape, dtype):
                yield name, Block(self._read(name), shape, dtype, start, end)

    def _read(self, name: str):
        return lambda start, end, out: self._reader.read_rows(name, start, end, out)

    def _index(self) -> bytes:
        weight_map = {name: shard.file_name for shard in self._shards for name in shard.names}
        total = sum(shard.num_bytes for shard in self._shards)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(content, indent=2) + "\n").encode()
