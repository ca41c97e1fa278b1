"""The index: a data set tokenised once, kept in an Arrow file that every process maps into memory.

A folder holds ``index.json`` (key and summary, renamed into place last: it is what makes an index complete), the Arrow
file it names, ``faults.jsonl`` (every dropped record) and ``notes.jsonl`` (odd pictures). The key is a hash of
everything the content depends on, so a second build returns at once.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

import numpy as np
import pyarrow as pa

from dc_megatron.data.index_build import Progress, build_index
from dc_megatron.data.index_key import index_key
from dc_megatron.data.index_samples import sample_from_record
from dc_megatron.data.index_summary import IndexSummary, SourceSummary, arrow_path, check_summary, read_summary
from dc_megatron.data.picture import Picture
from dc_megatron.data.tokenization import TokenisedSample
from dc_megatron.errors import UserError

__all__ = [
    "IndexSummary",
    "Progress",
    "SampleIndex",
    "SourceSummary",
    "build_index",
    "check_summary",
    "index_key",
    "open_index",
    "read_summary",
    "sample_from_record",
]


class SampleIndex:
    """Memory-mapped samples of a finished index: ``len()``, ``[i]`` -> TokenisedSample, ``summary``.

    ``lengths`` (positions), ``tiles`` (of all pictures): int32 [n]; ``sources``: int16 [n]. They are read at first use.
    """

    def __init__(self, path: str, summary: IndexSummary):
        self.summary = summary
        reader = pa.ipc.open_file(pa.memory_map(path))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self._rows: list[_Rows | None] = [None] * len(self._batches)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> TokenisedSample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of an index with {len(self)}")
        batch = bisect_right(self._starts, number) - 1
        rows = self._rows[batch]
        if rows is None:
            rows = self._rows[batch] = _Rows(self._batches[batch])
        return rows[int(number) - self._starts[batch]]

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._column("length", np.int32)

    @cached_property
    def tiles(self) -> np.ndarray:
        return self._column("tiles", np.int32)

    @cached_property
    def sources(self) -> np.ndarray:
        return self._column("source", np.int16)

    def _column(self, name: str, kind: type) -> np.ndarray:
        return np.concatenate([np.empty(0, kind), *(batch.column(name).to_numpy() for batch in self._batches)])


class _Rows:
    """The columns of a batch as numpy views: going through Arrow for every value costs ten times as much."""

    def __init__(self, batch: pa.RecordBatch):
        self._id = batch.column("id")
        self._source, self._record, self._length = (
            batch.column(name).to_numpy() for name in ("source", "record", "length")
        )
        (self._ids, self._id_ends), (self._labels, self._label_ends) = (
            (batch.column(name).values.to_numpy(), batch.column(name).offsets.to_numpy())
            for name in ("input_ids", "labels")
        )
        images = batch.column("images")
        self._image_ends = images.offsets.to_numpy()
        self._names, *numbers = images.values.flatten()
        self._numbers = [column.to_numpy() for column in numbers]

    def __getitem__(self, row: int) -> TokenisedSample:
        source = int(self._source[row])
        return TokenisedSample(
            input_ids=self._ids[self._id_ends[row] : self._id_ends[row + 1]],
            labels=self._labels[self._label_ends[row] : self._label_ends[row + 1]],
            images=tuple(
                self._picture(number, source) for number in range(self._image_ends[row], self._image_ends[row + 1])
            ),
            length=int(self._length[row]),
            identifier=self._id[row].as_py(),
            record=int(self._record[row]),
            source=source,
        )

    def _picture(self, number: int, source: int) -> Picture:
        width, height, tokens, tiles, frame = (int(column[number]) for column in self._numbers)
        return Picture(self._names[number].as_py(), width, height, tokens, tiles, source, frame)


def open_index(folder: str) -> SampleIndex:
    """The finished index in ``folder``; UserError where there is none."""
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{folder}: holds no finished data index; build it first")
    return SampleIndex(arrow_path(folder, summary.key), summary)
