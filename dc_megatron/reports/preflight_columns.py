"""The numbers of a finished index as numpy columns: what histograms, packing and the choice of pictures work on.

A few dozen bytes a sample; texts and names stay in the memory-mapped index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from dc_megatron.data.tokenization import IGNORE


@dataclass(frozen=True)
class Columns:
    """n samples in the order of the index, and their p pictures (one that two samples share is there twice).

    source int16, record int64, length (positions), tiles, supervised (targets), pictures, text (positions that are not
    of pictures): int32 [n]. width, height, tokens, frame (-1: no video file): int32 [p]; identity: uint64 [p], equal
    for the same source, name and frame; owner: int64 [p], the sample.
    """

    source: np.ndarray
    record: np.ndarray
    length: np.ndarray
    tiles: np.ndarray
    supervised: np.ndarray
    text: np.ndarray
    pictures: np.ndarray
    width: np.ndarray
    height: np.ndarray
    tokens: np.ndarray
    frame: np.ndarray
    identity: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.pictures)), self.pictures)

    @property
    def first_pictures(self) -> np.ndarray:
        """int64 [n]: number of the first picture of every sample among all p."""
        return np.cumsum(self.pictures, dtype=np.int64) - self.pictures

    @property
    def different_pictures(self) -> np.ndarray:
        """int64: of every different picture the number of its first appearance, in order."""
        return np.sort(np.unique(self.identity, return_index=True)[1])

    def per_source(self, values: np.ndarray, sources: int) -> np.ndarray:
        """int64 [sources]: sums of int [n] ``values``."""
        sums = np.zeros(sources, dtype=np.int64)
        np.add.at(sums, self.source, values)
        return sums


def read_columns(path: str) -> Columns:
    """The columns of the index's Arrow file (see index_samples.SCHEMA)."""
    reader = pa.ipc.open_file(pa.memory_map(path))
    parts = [_of_batch(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    kinds = {"source": np.int16, "record": np.int64, "identity": np.uint64}
    columns = {
        name: np.concatenate([np.zeros(0, kinds.get(name, np.int32)), *(part[name] for part in parts)])
        for name in Columns.__dataclass_fields__
    }
    return Columns(**columns)


def _of_batch(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    images = batch.column("images")
    ends = images.offsets.to_numpy()
    names, *numbers = images.values.flatten()
    named = zip(("width", "height", "tokens", "tiles", "frame"), numbers, strict=True)
    numbers = {name: column.to_numpy() for name, column in named}
    source, length = batch.column("source").to_numpy(), batch.column("length").to_numpy()
    of_pictures = _sums(numbers["tokens"], ends)
    of_picture = np.repeat(source, np.diff(ends))
    keys = zip(of_picture.tolist(), numbers["frame"].tolist(), names.to_pylist(), strict=True)
    return {
        "source": source,
        "record": batch.column("record").to_numpy(),
        "length": length,
        "tiles": batch.column("tiles").to_numpy(),
        "supervised": _supervised(batch.column("labels")),
        "text": (length - of_pictures).astype(np.int32),
        "pictures": np.diff(ends).astype(np.int32),
        **{name: numbers[name] for name in ("width", "height", "tokens", "frame")},
        "identity": np.fromiter((_identity(*key) for key in keys), dtype=np.uint64, count=len(of_picture)),
    }


def _supervised(labels: pa.ListArray) -> np.ndarray:
    """int32: the targets of every sample that some position predicts, as TokenisedSample counts them."""
    ends, values = labels.offsets.to_numpy(), labels.values.to_numpy()
    is_target = values != IGNORE
    filled = np.diff(ends) > 0
    # The first position has none before it.
    is_target[ends[:-1][filled]] = False
    return _sums(is_target, ends).astype(np.int32)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [len(ends) - 1]: sums of ``values[ends[i]:ends[i + 1]]``."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return running[ends[1:]] - running[ends[:-1]]


def _identity(source: int, frame: int, name: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{source}:{frame}:{name}".encode())
