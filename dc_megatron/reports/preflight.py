"""Preflight: can this data be trained on, what is lost, how well does it pack, and which --seq-length?

The index is the one that training builds; on top of it come a pass over the data files and some decoded pictures.
A report is a dictionary of plain values (``source`` is a number in ``sources``, ``record`` counts from 0 in its file):

    verdict              "fine" or "refused"
    findings             [{"level": "refused", "warning" or "note", "text"}], the gravest first
    settings             what was asked, by flag
    index                {"folder" (null: a temporary one), "key", "found": it had been finished before}
    sources, total       records, kept, dropped, dropped_by_reason, truncated, tokens (positions), text_tokens,
                         supervised_tokens, images (frames of videos among them), different_images, videos, tiles,
                         text_only, one_image, several_images, with_video; a source has data_path, image_folder, weight
    lengths              of samples, their text, their targets: mean, median, p95, max; null where nothing is kept
    packing              see preflight_packing.packing_table; null where nothing is kept
    cut                  [{"model_max_length", "share"}]: share of the samples that each would cut
    suggestions          {"seq_length", "model_max_length"}, each {"value", "why"}
    dropped_records      [{"source", "record", "id", "reason", "detail"}], the first MOST_DROPPED
    dropped_left_out     how many more there are (all are in faults.jsonl of a kept index)
    odd_pictures         by kind: {"count", "what", "pictures": [{"source", "record", "name"}, the first ones]}
    decoding             see preflight_decoding.check_decoding
    duplicates           {"content", "ids"}: see preflight_duplicates
    template_marks       {"records", "marks": {words: {"records", "examples"}}}: words of templates inside of messages
    answers_with_image   {"records", "examples"}
    page                 the HTML file
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from dc_megatron.config import DataConfig
from dc_megatron.data.faults import RecordFault
from dc_megatron.data.image_header import NOTES
from dc_megatron.data.image_store import ImageStore, open_stores
from dc_megatron.data.index import IndexSummary, SampleIndex, build_index, open_index
from dc_megatron.data.index_summary import FAULTS_FILE, NOTES_FILE, SourceSummary, arrow_path
from dc_megatron.data.tokenization import TextTokenizer, load_tokenizer
from dc_megatron.errors import UserError
from dc_megatron.reports.preflight_columns import Columns, read_columns
from dc_megatron.reports.preflight_decoding import check_decoding
from dc_megatron.reports.preflight_duplicates import same_content, same_id
from dc_megatron.reports.preflight_images import odd_pictures
from dc_megatron.reports.preflight_packing import cut_shares, packing_table, suggested_length, suggested_maximum
from dc_megatron.reports.preflight_page import page
from dc_megatron.reports.preflight_plots import plots
from dc_megatron.reports.preflight_records import MarkCount, RecordFindings, read_records
from dc_megatron.reports.preflight_samples import shown_samples
from dc_megatron.reports.preflight_settings import PreflightSettings, Shapes, data_config, read_shapes
from dc_megatron.reports.preflight_verdict import REFUSED, findings

# What one report holds at most, whatever the data; counts are always of all.
MOST_DROPPED = 100_000
_MOST_ODD = 1000
_THUMBNAILS = 6

Progress = Callable[[str, int, int | None], None]


@dataclass
class _Data:
    """An opened index with everything that was read to it."""

    config: DataConfig
    shapes: Shapes
    folder: str
    index: SampleIndex
    columns: Columns
    tokenizer: TextTokenizer
    stores: list[ImageStore]

    @property
    def summary(self) -> IndexSummary:
        return self.index.summary


def preflight(settings: PreflightSettings, progress: Progress = lambda what, done, total=None: None) -> dict:
    """The report, whose page is written on the way. progress(what, done, total or None).

    UserError: what training would refuse before it looks at a record, and data files that are no JSON.
    """
    shapes = read_shapes(settings)
    config = data_config(settings, shapes)
    _check_places(settings)
    with contextlib.ExitStack() as stack:
        folder = settings.index_folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="preflight-"))
        built = []

        def counted(done: int, total: int) -> None:
            built[:] = [done]
            progress("records indexed", done, total)

        build_index(config, folder, counted, check=False)
        index = open_index(folder)
        data = _Data(
            config=config,
            shapes=shapes,
            folder=folder,
            index=index,
            columns=read_columns(arrow_path(folder, index.summary.key)),
            tokenizer=load_tokenizer(config.tokenizer_path, config.version),
            stores=open_stores(config.sources),
        )
        return _examine(settings, data, found=not built, progress=progress)


def _examine(settings: PreflightSettings, data: _Data, *, found: bool, progress: Progress) -> dict:
    config, columns, summary = data.config, data.columns, data.summary
    records = read_records(
        config,
        columns,
        _without_target(data.folder),
        data.tokenizer,
        data.stores,
        lambda done: progress("records compared", done, summary.records),
    )
    dropped = list(itertools.islice(_lines(data.folder, FAULTS_FILE), MOST_DROPPED))
    odd, thumbnails = odd_pictures(_lines(data.folder, NOTES_FILE), data.stores, _MOST_ODD, _THUMBNAILS)
    positions = data.shapes.language.max_position_embeddings if data.shapes.language else None
    report = {
        "verdict": "",
        "findings": [],
        "settings": asdict(settings),
        "index": {"folder": settings.index_folder or None, "key": summary.key, "found": found},
        "sources": [_source(data, records, number) for number in range(len(config.sources))],
        "total": {},
        "lengths": _lengths(columns),
        **_advice(data, records, settings.samples_per_step, positions, progress),
        "dropped_records": dropped,
        "dropped_left_out": summary.dropped_samples - len(dropped),
        "odd_pictures": {
            kind: {"count": number, "what": NOTES.get(kind, kind), "pictures": odd.get(kind, [])}
            for kind, number in sorted(summary.notes.items(), key=lambda entry: -entry[1])
        },
        "decoding": check_decoding(
            data.index,
            columns,
            data.stores,
            settings.decode,
            settings.seed,
            lambda done, total: progress("pictures decoded", done, total),
        ),
        "duplicates": {
            "content": _with_ids(same_content(records.content, records.place), data),
            "ids": _with_ids(same_id(records.ids, records.content, records.place), data),
        },
        "template_marks": {
            "records": sum(records.marked.values()),
            "marks": {mark: _examples(counted) for mark, counted in records.marks.items()},
        },
        "answers_with_image": _examples(records.answers_with_image),
        "page": settings.page,
    }
    report["total"] = _total(report["sources"], columns)
    report["findings"] = findings(report, summary, config, positions)
    refused = any(finding["level"] == REFUSED for finding in report["findings"])
    report["verdict"] = "refused" if refused else "fine"
    progress("page", 0, None)
    samples = shown_samples(data.index, columns, config, data.shapes.vision, data.tokenizer, data.stores)
    drawn = plots(columns, report["packing"], config.model_max_length)
    _write(settings.page, page(report, config, samples, thumbnails, drawn))
    return report


def _source(data: _Data, records: RecordFindings, number: int) -> dict:
    """One source's entry of the report."""
    source: SourceSummary = data.summary.sources[number]
    columns, own = data.columns, data.columns.source == number
    pictures = columns.pictures[own]
    of_pictures = columns.source[columns.owner] == number
    return {
        "data_path": source.data_path,
        "image_folder": source.image_folder,
        "weight": data.config.sources[number].weight,
        "records": source.records,
        "kept": source.kept,
        "dropped": source.dropped_samples,
        "dropped_by_reason": dict(sorted(source.dropped.items(), key=lambda entry: -entry[1])),
        "truncated": source.truncated,
        "tokens": source.tokens,
        "text_tokens": int(columns.text[own].sum(dtype=np.int64)),
        "supervised_tokens": int(columns.supervised[own].sum(dtype=np.int64)),
        "images": source.images,
        "different_images": len(np.unique(columns.identity[of_pictures])),
        "videos": records.videos[number],
        "tiles": int(columns.tiles[own].sum(dtype=np.int64)),
        "text_only": source.text_only,
        "one_image": int((pictures == 1).sum()),
        "several_images": int((pictures > 1).sum()),
        "with_video": records.with_video[number],
    }


def _total(sources: list[dict], columns: Columns) -> dict:
    named = ("data_path", "image_folder", "weight", "dropped_by_reason")
    total = {name: sum(source[name] for source in sources) for name in sources[0] if name not in named}
    reasons: dict[str, int] = {}
    for source in sources:
        for reason, number in source["dropped_by_reason"].items():
            reasons[reason] = reasons.get(reason, 0) + number
    total["dropped_by_reason"] = dict(sorted(reasons.items(), key=lambda entry: -entry[1]))
    return total


def _lengths(columns: Columns) -> dict:
    named = {"samples": columns.length, "text": columns.text, "targets": columns.supervised}
    return {name: _figures(values) if len(values) else None for name, values in named.items()}


def _figures(values: np.ndarray) -> dict:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }


def _advice(
    data: _Data, records: RecordFindings, samples_per_step: int, positions: int | None, progress: Progress
) -> dict:
    """The report's ``packing``, ``cut`` and ``suggestions``."""
    columns, config = data.columns, data.config
    suggestions, table = {}, None
    if len(columns.length):
        progress("samples packed", len(columns.length), None)
        table = packing_table(columns.length, columns.tiles, columns.source, config, samples_per_step)
        value, why = suggested_length(table)
        suggestions["seq_length"] = {"value": value, "why": why}
    shares = cut_shares(
        columns.length[records.whole], records.doubtful, records.doubtful_samples, config.model_max_length
    )
    longest = max(int(columns.length.max(initial=0)), int(records.doubtful.max(initial=0)))
    if longest:
        seq_length = suggestions["seq_length"]["value"] if suggestions else None
        value, why = suggested_maximum(shares, config.model_max_length, longest, seq_length, positions)
        suggestions["model_max_length"] = {"value": value, "why": why}
    return {"packing": table, "cut": shares, "suggestions": suggestions}


def _with_ids(found: dict, data: _Data) -> dict:
    """``found`` with {"source", "record", "id"} for its places; an id of a dropped record is not known here ("")."""
    columns = data.columns
    keys = columns.source.astype(np.int64) << 40 | columns.record

    def described(place: tuple[int, int]) -> dict:
        source, record = place
        key = source << 40 | record
        number = int(np.searchsorted(keys, key))
        known = number < len(keys) and int(keys[number]) == key
        return {"source": source, "record": record, "id": data.index[number].identifier if known else ""}

    for example in found["examples"]:
        example["places"] = [described(place) for place in example["places"]]
    return found


def _examples(counted: MarkCount) -> dict:
    names = ("source", "record", "id", "text")
    return {
        "records": counted.records,
        "examples": [dict(zip(names, example, strict=True)) for example in counted.examples],
    }


def _without_target(folder: str) -> Iterator[tuple[int, int]]:
    """(source, record) of the records that were dropped for want of a target, in order."""
    for fault in _lines(folder, FAULTS_FILE):
        if fault["reason"] == RecordFault.NO_TARGET:
            yield fault["source"], fault["record"]


def _lines(folder: str, name: str) -> Iterator[dict]:
    """The objects of a JSON Lines file of the index."""
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        yield from map(json.loads, file)


def _check_places(settings: PreflightSettings) -> None:
    """UserError where index or page could not be written; makes the index's folder."""
    if settings.index_folder:
        try:
            os.makedirs(settings.index_folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"--index-folder {settings.index_folder}: cannot be made: {error}") from None
    folder = os.path.dirname(settings.page)
    if settings.html and folder and not os.path.isdir(folder):
        raise UserError(f"--html {settings.html}: no folder {folder}; make it first")
    if os.path.isdir(settings.page):
        raise UserError(f"--html {settings.page}: is a folder; name a file")


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error}") from None
