"""What an index holds and what was left out, kept beside it in ``index.json``."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field

from dc_megatron.config import DataConfig, DataSource
from dc_megatron.data.index_samples import ChunkResult, Counts
from dc_megatron.data.tokenization import check_largest_id
from dc_megatron.errors import UserError

EXAMPLES_PER_REASON = 3
SUMMARY_FILE, FAULTS_FILE, NOTES_FILE = "index.json", "faults.jsonl", "notes.jsonl"


@dataclass
class SourceSummary:
    """One data source. dropped: records by reason; notes: odd pictures by kind (see image_header.NOTES).

    Other fields are sums as in Counts.
    """

    data_path: str
    image_folder: str
    records: int = 0
    kept: int = 0
    tokens: int = 0
    images: int = 0
    text_only: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def dropped_samples(self) -> int:
        return sum(self.dropped.values())


@dataclass
class IndexSummary(Counts):
    """The whole index: sums of Counts, and for each data source. examples: the first few dropped records by reason.

    kept_hash: 16 hex digits over which records were kept, in their order, with their lengths and tiles. The key does
    not tell: it knows image files by their names only.
    """

    key: str = ""
    records: int = 0
    kept_hash: str = ""
    sources: list[SourceSummary] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped records by reason, over all sources."""
        return _summed(source.dropped for source in self.sources)

    @property
    def notes(self) -> dict[str, int]:
        """Odd pictures by kind (see image_header.NOTES), over all sources."""
        return _summed(source.notes for source in self.sources)

    @property
    def dropped_samples(self) -> int:
        return sum(source.dropped_samples for source in self.sources)

    def add(self, result: ChunkResult) -> None:
        """Count one chunk; chunks come in order."""
        counts, source = result.counts, self.sources[result.source]
        self.records += result.records
        source.records += result.records
        for name, value in asdict(counts).items():
            together = max if name == "largest_id" else int.__add__
            setattr(self, name, together(getattr(self, name), value))
            if hasattr(source, name):
                setattr(source, name, together(getattr(source, name), value))
        for record, _, reason, detail in result.faults:
            source.dropped[reason] = source.dropped.get(reason, 0) + 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < EXAMPLES_PER_REASON:
                examples.append(f"{self._place(result.source)}record {record}: {detail}")
        for _, _, kind in result.notes:
            source.notes[kind] = source.notes.get(kind, 0) + 1

    def _place(self, source: int) -> str:
        return f"{self.sources[source].data_path} " if len(self.sources) > 1 else ""


def empty_summary(key: str, sources: tuple[DataSource, ...]) -> IndexSummary:
    """A summary in which nothing was counted yet."""
    return IndexSummary(key=key, sources=[SourceSummary(source.data_path, source.image_folder) for source in sources])


def arrow_path(folder: str, key: str) -> str:
    return os.path.join(folder, f"index-{key}.arrow")


def read_summary(folder: str) -> IndexSummary | None:
    """The summary of the finished index in ``folder``, or None."""
    try:
        with open(os.path.join(folder, SUMMARY_FILE), encoding="utf-8") as file:
            content = json.load(file)
        content["sources"] = [SourceSummary(**source) for source in content["sources"]]
        summary = IndexSummary(**content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    return summary if os.path.isfile(arrow_path(folder, summary.key)) else None


def write_summary(folder: str, summary: IndexSummary) -> None:
    """Makes the index in ``folder`` complete; everything else must lie there."""
    write_json(os.path.join(folder, SUMMARY_FILE), asdict(summary))


def check_summary(summary: IndexSummary, config: DataConfig) -> None:
    """Raise UserError where the index cannot be trained on: unknown token ids, too many records dropped, or all."""
    check_bad_rate(summary, config)
    check_ids(summary, config)


def check_ids(summary: IndexSummary, config: DataConfig) -> None:
    """Raise UserError where a token id lies beyond the model's vocabulary."""
    check_largest_id(summary.largest_id, config.vocab_size, config.tokenizer_path, f"--data_path {config.data_path}")


def check_bad_rate(summary: IndexSummary, config: DataConfig) -> None:
    """Raise UserError where too many records were dropped, or all of a source; names counts, reasons and examples."""
    rate = summary.dropped_samples / max(summary.records, 1)
    empty = [source.data_path for source in summary.sources if source.records and not source.kept]
    if rate <= config.max_bad_sample_rate and not empty:
        return
    dropped = summary.dropped
    reasons = "; ".join(
        f"{count} x {reason} (e.g. {' | '.join(summary.examples[reason])})" for reason, count in dropped.items()
    )
    advice = f"allow {rate:.4g} with --max-bad-sample-rate"
    if empty:
        of_which = f" of {' '.join(empty)}" if len(summary.sources) > 1 else ""
        advice = f"nothing is left{of_which} to train on"
    raise UserError(
        f"--data_path {config.data_path}: {summary.dropped_samples} of {summary.records} records looked at cannot be"
        f" used: {reasons}. Correct the data or --image_folder {config.image_folder}, or the limit"
        f" --max-bad-sample-rate {config.max_bad_sample_rate}: {advice}. tools/preflight.py lists them all"
    )


def write_json(path: str, content: dict) -> None:
    """Write by a temporary name and a rename, so that a reader sees the old file or the new one."""
    temporary = f"{path}.{platform.node()}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _summed(counts) -> dict[str, int]:
    sums: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            sums[name] = sums.get(name, 0) + count
    return sums
