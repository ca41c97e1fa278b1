"""Making an index: chunks of the data files go to the workers, their results in order into files of one folder.

Memory depends on neither the number of records nor their order: records stream through, and what is dropped goes to a
file. The result is the same for any number of workers, byte for byte.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np
import pyarrow as pa
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.data.index_key import index_key
from dc_megatron.data.index_samples import SCHEMA, ChunkResult
from dc_megatron.data.index_summary import (
    FAULTS_FILE,
    NOTES_FILE,
    IndexSummary,
    arrow_path,
    check_bad_rate,
    check_ids,
    check_summary,
    empty_summary,
    read_summary,
    write_summary,
)
from dc_megatron.data.index_workers import sample_makers, worker_count
from dc_megatron.data.json_stream import Chunk, json_chunks
from dc_megatron.data.tokenization import load_tokenizer
from dc_megatron.errors import UserError

# A data set that is wrong throughout should say so before every one of its records has been looked at.
_EARLY_STOP = 200
# No record that can be used is shorter: it has the names of its messages' fields in it.
_SHORTEST_RECORD = 64

Progress = Callable[[int, int], None]


def build_index(
    config: DataConfig,
    folder: str,
    progress: Progress | None = None,
    workers: int | None = None,
    *,
    check: bool = True,
) -> IndexSummary:
    """Tokenise ``config.sources`` into ``folder``, or return the summary at once where that has been done.

    progress(done, total) counts records and is called now and then; total is an estimate until the end. workers:
    processes (default: one for every core, small data sets in this process). check=False: an index comes about however
    much was dropped. Raises UserError for unreadable input, for token ids that the model has not, and where more
    records than ``config.max_bad_sample_rate`` allows are unusable, or all of a source.
    """
    key = index_key(config)
    summary = read_summary(folder)
    if summary is None or summary.key != key:
        try:
            os.makedirs(folder, exist_ok=True)
            summary = _build(config, folder, key, progress or (lambda done, total: None), workers, check)
        except OSError as error:
            raise UserError(f"{folder}: the data index cannot be built there: {error}") from error
    if check:
        check_summary(summary, config)
    return summary


def _build(
    config: DataConfig, folder: str, key: str, progress: Progress, workers: int | None, check: bool
) -> IndexSummary:
    tokenizer = load_tokenizer(config.tokenizer_path, config.version)
    sizes = [os.path.getsize(source.data_path) for source in config.sources]
    summary = empty_summary(key, config.sources)
    kept = xxhash.xxh3_64()
    with _Files(folder, key) as files:
        with sample_makers(config, tokenizer, folder, worker_count(workers, sum(sizes))) as makers:
            for result in makers.map(_chunks(config)):
                summary.add(result)
                files.add(result)
                kept.update(_identity(result.batch))
                bytes_done = sum(sizes[: result.source]) + min(result.next_start, sizes[result.source])
                if check:
                    _stop_early(summary, config, sum(sizes) - bytes_done)
                progress(summary.records, _estimate(summary.records, bytes_done, sum(sizes)))
        progress(summary.records, summary.records)
        summary.kept_hash = kept.hexdigest()
        if check:
            check_summary(summary, config)
        return files.finish(summary)


def _chunks(config: DataConfig) -> Iterator[tuple[int, Chunk]]:
    for number, source in enumerate(config.sources):
        for chunk in json_chunks(source.data_path):
            yield number, chunk


def _identity(batch: pa.RecordBatch) -> bytes:
    """What tells one choice of samples from another: source, record, length and tiles of each."""
    columns = [batch.column(name).to_numpy() for name in ("source", "record", "length", "tiles")]
    return np.stack(columns, axis=1).astype("<i8").tobytes()


def _stop_early(summary: IndexSummary, config: DataConfig, bytes_left: int) -> None:
    """UserError as soon as the end can only be a refusal, whatever the rest of the files holds."""
    most_records = summary.records + bytes_left // _SHORTEST_RECORD
    if summary.dropped_samples > max(_EARLY_STOP, config.max_bad_sample_rate * most_records):
        check_bad_rate(summary, config)
    check_ids(summary, config)


def _estimate(records: int, bytes_done: int, size: int) -> int:
    """Records of all files, if the rest is like what was read; more than were read while something is left."""
    return max(records + 1, round(records * size / max(bytes_done, 1)))


class _Files:
    """The files of an index under temporary names; ``finish`` gives them their own, else they are removed."""

    def __init__(self, folder: str, key: str):
        self._folder, self._key = folder, key
        self._arrow = arrow_path(folder, key)
        self._lists = [os.path.join(folder, name) for name in (FAULTS_FILE, NOTES_FILE)]
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Files:
        try:
            sink = self._open.enter_context(pa.OSFile(self._temporary(self._arrow), "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_file(sink, SCHEMA))
            faults, notes = map(self._temporary, self._lists)
            self._faults = self._open.enter_context(open(faults, "w", encoding="utf-8"))
            self._notes = self._open.enter_context(open(notes, "w", encoding="utf-8"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._open.close()
        for path in (self._arrow, *self._lists):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._temporary(path))

    def add(self, result: ChunkResult) -> None:
        if result.batch.num_rows:
            self._writer.write_batch(result.batch)
        _write_lines(self._faults, result.source, ("record", "id", "reason", "detail"), result.faults)
        _write_lines(self._notes, result.source, ("record", "name", "kind"), result.notes)

    def finish(self, summary: IndexSummary) -> IndexSummary:
        """The summary of the index that lies in the folder now: this one, or an equal one that was there first."""
        self._open.close()
        finished = read_summary(self._folder)
        if finished is not None and finished.key == self._key:
            # Another node on a shared disk was faster, and others may have mapped its file already: over NFS a file
            # that is replaced below them is a bus error.
            return finished
        for path in (self._arrow, *self._lists):
            os.replace(self._temporary(path), path)
        write_summary(self._folder, summary)
        for path in glob.glob(os.path.join(glob.escape(self._folder), "index-*.arrow")):
            if path != self._arrow:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
        return summary

    def _temporary(self, path: str) -> str:
        return f"{path}.{platform.node()}.{os.getpid()}.tmp"


def _write_lines(file: TextIO, source: int, names: tuple[str, ...], rows: list[tuple]) -> None:
    """One JSON object a row."""
    for row in rows:
        file.write(json.dumps({"source": source, **dict(zip(names, row, strict=True))}) + "\n")
