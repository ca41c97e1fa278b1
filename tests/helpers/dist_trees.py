"""Small torch_dist trees written without Megatron, chunk by chunk, so that a test can damage any part of them."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]


def archive(value) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def grid(shape: tuple[int, ...], parts: tuple[int, ...]) -> list[Box]:
    """(offsets, sizes) of the cells where dimension i is cut into parts[i] equal pieces."""
    boxes = [((), ())]
    for size, count in zip(shape, parts, strict=True):
        step = size // count
        boxes = [((*o, i * step), (*s, step)) for o, s in boxes for i in range(count)]
    return boxes


def cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].clone()


class TreeWriter:
    """Chunks and objects are appended to ``__0_0.distcp`` and ``__1_0.distcp`` in turn; ``finish`` writes the rest."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.metadata = folder, Metadata({}, storage_data={})
        self._turn = 0

    def add(self, key: str, tensor: torch.Tensor, boxes: list[Box] | None = None, stored=cut) -> TreeWriter:
        """A tensor in ``boxes`` (default: one); ``stored(tensor, box)`` is what is written for each."""
        boxes = boxes or [((0,) * tensor.dim(), tuple(tensor.shape))]
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        entry = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
        self.metadata.state_dict_metadata[key] = entry
        for number, box in enumerate(boxes):
            self.metadata.storage_data[MetadataIndex(key, box[0], number)] = self.append(archive(stored(tensor, box)))
        return self

    def add_object(self, key: str, value=None, data: bytes | None = None) -> TreeWriter:
        self.metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self.metadata.storage_data[MetadataIndex(key)] = self.append(archive(value) if data is None else data)
        return self

    def append(self, data: bytes) -> _StorageInfo:
        name = f"__{self._turn % 2}_0.distcp"
        self._turn += 1
        with open(self.folder / name, "ab") as file:
            start = file.tell()
            file.write(data)
        return _StorageInfo(name, start, len(data))

    def finish(self) -> Path:
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata))
        (self.folder / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        return self.folder


STACKED = "language_model.decoder.layers.{layer}.mlp.linear_fc2.weight"


def small_tensors() -> dict[str, torch.Tensor]:
    """Keys as stored -> values, no two elements of a tensor alike."""
    shapes = {
        "language_model.embedding.word_embeddings.weight": (12, 6),
        "language_model.decoder.layers.mlp.linear_fc2.weight": (4, 6, 8),
        "language_model.decoder.layers.mlp.linear_fc1.weight": (4, 8, 6),
        "language_model.decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 6),
        "language_model.decoder.final_layernorm.weight": (6,),
    }
    return {key: torch.arange(float(torch.Size(shape).numel())).reshape(shape) for key, shape in shapes.items()}


PARTS = {
    "language_model.embedding.word_embeddings.weight": (2, 1),
    "language_model.decoder.layers.mlp.linear_fc2.weight": (4, 1, 2),
    "language_model.decoder.layers.mlp.linear_fc1.weight": (2, 4, 1),
    "language_model.decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 1),
    "language_model.decoder.final_layernorm.weight": (1,),
}


def small_tree(folder: Path) -> TreeWriter:
    """A tree as TP 2 leaves it: rows, columns and chunks of several layers. Call ``finish`` when it is as wanted."""
    writer = TreeWriter(folder)
    for key, tensor in small_tensors().items():
        writer.add(key, tensor, grid(tuple(tensor.shape), PARTS[key]))
    for layer in range(4):
        writer.add_object(f"language_model.decoder.layers.mlp.linear_fc2._extra_state/shard_{layer}_4", [None])
    writer.add_object("common_state/shard_0_1", [{"iteration": 7, "checkpoint_version": 3.0}])
    return writer
