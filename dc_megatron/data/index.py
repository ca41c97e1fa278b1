"""The index: a data set tokenised once, kept in an Arrow file that every process maps into memory.

A folder holds ``index.json`` (key and summary, renamed into place last: it is what makes an index complete) and the
Arrow file it names. The key is a hash of everything the content depends on, so a second build returns at once.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import xxhash

from dc_megatron.config import DataConfig
from dc_megatron.data.conversation import render
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_reference import check_header
from dc_megatron.data.llava_json import parse_record, read_records
from dc_megatron.data.tokenization import TextTokenizer, TokenisedSample, check_largest_id, load_tokenizer, tokenise
from dc_megatron.errors import UserError

ROWS_PER_BATCH = 1024
EXAMPLES_PER_REASON = 3
# A data set that is wrong throughout should say so before every one of its records has been looked at.
_EARLY_STOP = 200
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("record", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("images", pa.list_(pa.string())),
        ("length", pa.int32()),
    ]
)
# The files of a folder that decide about ids.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
_CODE_FILES = ("conversation.py", "tokenization.py", "llava_json.py", "image_reference.py", "index.py", "faults.py")

Progress = Callable[[int, int], None]


@dataclass
class IndexSummary:
    """What an index holds. dropped counts records by reason, examples gives the first few of each; tokens are
    positions after expansion and truncation; truncated counts kept samples that were cut.

    largest_id: the largest token id of all kept samples. kept_hash: 16 hex digits over which records were kept, in
    their order, and their lengths. The key does not tell: it knows image files by their names only.
    """

    key: str = ""
    records: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    truncated: int = 0
    largest_id: int = -1
    kept_hash: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dropped_samples(self) -> int:
        return sum(self.dropped.values())

    def count_kept(self, sample: TokenisedSample) -> None:
        self.kept += 1
        self.tokens += sample.length
        self.supervised_tokens += sample.supervised_tokens
        self.images += len(sample.images)
        self.truncated += sample.truncated
        self.largest_id = max(self.largest_id, int(sample.input_ids.max()))

    def count_dropped(self, index: int, fault: RecordFault) -> None:
        self.dropped[fault.reason] = self.dropped.get(fault.reason, 0) + 1
        examples = self.examples.setdefault(fault.reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(f"record {index}: {fault.detail}")


class SampleIndex:
    """Memory-mapped samples of a finished index: ``len()``, ``[i]`` -> TokenisedSample, ``summary``."""

    def __init__(self, path: str, summary: IndexSummary):
        self.summary = summary
        reader = pa.ipc.open_file(pa.memory_map(path))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def __len__(self) -> int:
        return self.summary.kept

    def __getitem__(self, number: int) -> TokenisedSample:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of an index with {len(self)}")
        batch, row = self._batches[number // ROWS_PER_BATCH], number % ROWS_PER_BATCH
        return TokenisedSample(
            input_ids=batch.column("input_ids")[row].values.to_numpy(),
            labels=batch.column("labels")[row].values.to_numpy(),
            images=tuple(batch.column("images")[row].as_py()),
            length=batch.column("length")[row].as_py(),
            identifier=batch.column("id")[row].as_py(),
            record=batch.column("record")[row].as_py(),
        )


def index_key(config: DataConfig) -> str:
    """32 hex digits over data file, tokenizer files, the settings that matter, and the code that makes an index.

    Image files count by their names only. Raises UserError where the data file is missing.
    """
    if not os.path.isfile(config.data_path):
        raise UserError(f"--data_path {config.data_path}: no such file")
    import tokenizers

    digest = xxhash.xxh3_128()
    settings = (config.image_folder, config.version, config.model_max_length, config.tokens_per_image)
    digest.update(json.dumps([*settings, pa.__version__, tokenizers.__version__]).encode())
    here = os.path.dirname(__file__)
    files = [os.path.join(config.tokenizer_path, name) for name in _TOKENIZER_FILES]
    for path in [config.data_path, *files, *(os.path.join(here, name) for name in _CODE_FILES)]:
        if os.path.isfile(path):
            _hash_file(digest, path)
    return digest.hexdigest()


def build_index(config: DataConfig, folder: str, progress: Progress | None = None) -> IndexSummary:
    """Tokenise ``config.data_path`` into ``folder``, or return the summary at once where that has been done.

    progress(done, total) is called now and then. Raises UserError for unreadable input, for token ids that the model
    has not, and where more records than ``config.max_bad_sample_rate`` allows are unusable, or all.
    """
    key = index_key(config)
    summary = read_summary(folder)
    if summary is None or summary.key != key:
        records = read_records(config.data_path)
        tokenizer = load_tokenizer(config.tokenizer_path, config.version)
        os.makedirs(folder, exist_ok=True)
        summary = _write(config, folder, key, records, tokenizer, progress or (lambda done, total: None))
    check_summary(summary, config)
    return summary


def open_index(folder: str) -> SampleIndex:
    """The finished index in ``folder``; UserError where there is none."""
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{folder}: holds no finished data index; build it first")
    return SampleIndex(_arrow_path(folder, summary.key), summary)


def read_summary(folder: str) -> IndexSummary | None:
    """The summary of the finished index in ``folder``, or None."""
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            summary = IndexSummary(**json.load(file))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    return summary if os.path.isfile(_arrow_path(folder, summary.key)) else None


def check_summary(summary: IndexSummary, config: DataConfig) -> None:
    """Raise UserError where the index cannot be trained on: unknown token ids, too many records dropped, or all."""
    _check_bad_rate(summary, config)
    _check_ids(summary, config)


def _check_ids(summary: IndexSummary, config: DataConfig) -> None:
    check_largest_id(summary.largest_id, config.vocab_size, config.tokenizer_path, f"--data_path {config.data_path}")


def _check_bad_rate(summary: IndexSummary, config: DataConfig) -> None:
    """Names counts, reasons and examples of dropped records."""
    rate = summary.dropped_samples / summary.records
    if rate <= config.max_bad_sample_rate and summary.kept:
        return
    reasons = "; ".join(
        f"{count} x {reason} (e.g. {' | '.join(summary.examples[reason])})" for reason, count in summary.dropped.items()
    )
    advice = f"allow {rate:.4g} with --max-bad-sample-rate" if summary.kept else "nothing is left to train on"
    raise UserError(
        f"--data_path {config.data_path}: {summary.dropped_samples} of {summary.records} records looked at cannot be"
        f" used: {reasons}. Correct the data or --image_folder {config.image_folder}, or the limit"
        f" --max-bad-sample-rate {config.max_bad_sample_rate}: {advice}"
    )


def sample_from_record(config: DataConfig, tokenizer: TextTokenizer, record, index: int) -> TokenisedSample:
    """One record of the data file, checked and tokenised; raises RecordFault."""
    parsed = parse_record(record, index)
    rendered = render(config.version, parsed.messages)
    if rendered.image_count != len(parsed.images):
        raise RecordFault(
            RecordFault.IMAGE_COUNT, f"{rendered.image_count} <image> marks in the text, {len(parsed.images)} files"
        )
    for name in parsed.images:
        check_header(os.path.join(config.image_folder, name))
    sample = tokenise(
        tokenizer,
        rendered,
        parsed.images,
        tokens_per_image=config.tokens_per_image,
        model_max_length=config.model_max_length,
        identifier=parsed.identifier,
        record=index,
    )
    if not sample.supervised_tokens:
        raise RecordFault(RecordFault.NO_TARGET, f"none within --model_max_length {config.model_max_length} positions")
    return sample


def _write(
    config: DataConfig, folder: str, key: str, records: list, tokenizer: TextTokenizer, progress: Progress
) -> IndexSummary:
    summary = IndexSummary(key=key)
    kept = xxhash.xxh3_64()
    temporary = _arrow_path(folder, key) + f".{platform.node()}.{os.getpid()}.tmp"
    try:
        with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for rows in _samples(config, records, tokenizer, summary, progress):
                writer.write_batch(_record_batch(rows))
                kept.update(np.array([(row.record, row.length) for row in rows], dtype="<i8").tobytes())
            summary.kept_hash = kept.hexdigest()
        check_summary(summary, config)
        finished = read_summary(folder)
        if finished is not None and finished.key == key:
            # Another node on a shared disk was faster, and others may have mapped its file already: over NFS a file
            # that is replaced below them is a bus error.
            return finished
        os.replace(temporary, _arrow_path(folder, key))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
    write_json(os.path.join(folder, "index.json"), asdict(summary))
    for path in glob.glob(os.path.join(glob.escape(folder), "index-*.arrow")):
        if path != _arrow_path(folder, key):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    return summary


def _samples(config: DataConfig, records: list, tokenizer: TextTokenizer, summary: IndexSummary, progress: Progress):
    """Lists of ROWS_PER_BATCH kept samples (the last one shorter, perhaps empty), counted into ``summary``."""
    limit = max(_EARLY_STOP, config.max_bad_sample_rate * len(records))
    rows: list[TokenisedSample] = []
    for index, record in enumerate(records):
        summary.records += 1
        try:
            sample = sample_from_record(config, tokenizer, record, index)
        except RecordFault as fault:
            summary.count_dropped(index, fault)
            if summary.dropped_samples > limit:
                _check_bad_rate(summary, config)
        else:
            rows.append(sample)
            summary.count_kept(sample)
            _check_ids(summary, config)
        if len(rows) == ROWS_PER_BATCH:
            yield rows
            rows = []
        if summary.records % 100 == 0:
            progress(summary.records, len(records))
    progress(len(records), len(records))
    yield rows


def _record_batch(rows: list[TokenisedSample]) -> pa.RecordBatch:
    columns = {
        "id": [sample.identifier for sample in rows],
        "record": [sample.record for sample in rows],
        "input_ids": [sample.input_ids for sample in rows],
        "labels": [sample.labels for sample in rows],
        "images": [list(sample.images) for sample in rows],
        "length": [sample.length for sample in rows],
    }
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[column.name], type=column.type) for column in _SCHEMA], schema=_SCHEMA
    )


def _arrow_path(folder: str, key: str) -> str:
    return os.path.join(folder, f"index-{key}.arrow")


def write_json(path: str, content: dict) -> None:
    """Write by a temporary name and a rename, so that a reader sees the old file or the new one."""
    temporary = f"{path}.{platform.node()}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _hash_file(digest, path: str) -> None:
    # The name and size keep "ab" + "c" apart from "a" + "bc".
    digest.update(f"{os.path.basename(path)}:{os.path.getsize(path)}".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
