"""The preflight's page: one HTML file with plots and thumbnails inside it."""

from __future__ import annotations

from collections.abc import Sequence

from dc_megatron.config import DataConfig
from dc_megatron.data.picture import Picture
from dc_megatron.reports.html_parts import Html, cells_table, document, image, joined, tag
from dc_megatron.reports.preflight_lists import (
    dropped_records,
    file_of,
    name_of,
    of_frame,
    pictures,
    texts_and_duplicates,
    thumb,
)
from dc_megatron.reports.preflight_samples import Piece, ShownSample
from dc_megatron.reports.preflight_text import packing_rows, source_cells, source_name
from dc_megatron.reports.words import count, one_line, percent, several

_LONGEST_PIECE = 4000
_FIGURES = (("positions", "samples"), ("of text", "text"), ("targets", "targets"))
_ORDER = ("lengths", "supervised", "pictures", "sizes", "fill")

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1d2733;background:#fff;max-width:1180px;margin:0 auto;padding:16px 24px}
h1{font-size:20px;margin:8px 0}h2{font-size:16px;margin:28px 0 8px;border-bottom:1px solid #d5d9de;padding-bottom:3px}
h3{font-size:14px;margin:14px 0 4px}p{margin:6px 0}
table{border-collapse:collapse;margin:6px 0;font-size:13px}
th,td{padding:3px 9px;border-bottom:1px solid #e6e9ed;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600;color:#5a6775}table.numbers td,table.numbers th{text-align:right;white-space:nowrap}
table.numbers td:first-child,table.numbers th:first-child{text-align:left;white-space:normal}
.verdict{display:inline-block;padding:2px 10px;border-radius:4px;font-weight:600;color:#fff}
.verdict.fine{background:#2e7d4f}.verdict.refused{background:#b3372f}
.finding{padding:4px 10px;margin:4px 0;border-left:4px solid #9aa5b1;background:#f5f6f8;overflow-wrap:anywhere}
.finding.refused{border-color:#b3372f;background:#fbeeed}.finding.warning{border-color:#d9822b;background:#fdf5ec}
.plots{display:flex;flex-wrap:wrap;gap:10px}.plots img{width:100%;max-width:560px;height:auto}
.thumbs{display:flex;flex-wrap:wrap;gap:10px;margin:4px 0 10px}
.thumb{width:150px;font-size:12px;color:#5a6775;overflow-wrap:anywhere}
.thumb img,.none{display:block;border:1px solid #d5d9de;max-width:144px;max-height:144px}
.none{width:142px;padding:24px 0;text-align:center;background:#f5f6f8}
.sample{border:1px solid #d5d9de;border-radius:4px;padding:8px 12px;margin:10px 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace;background:#f8f9fa;padding:8px}
.target{background:#cdeccf;color:#0d3d1a}.picture{background:#d6e4f5;border-radius:3px;padding:0 4px}
.line{color:#a9b2bc}.left{color:#5a6775}summary{cursor:pointer;margin:4px 0}
code{font:13px ui-monospace,monospace;background:#f1f3f5;padding:0 3px}
"""


def page(
    report: dict,
    config: DataConfig,
    samples: Sequence[ShownSample],
    thumbnails: dict[str, list[tuple[dict, str]]],
    drawn: dict[str, str],
) -> str:
    """The page of a report (see preflight.py). thumbnails: (entry, data URI) by kind of odd picture; drawn: plots."""
    return document(
        f"Preflight: {config.data_path}",
        _STYLE,
        *_head(report, config),
        tag("h2", "Data"),
        *_data(report),
        tag("h2", "Lengths and packing"),
        *_packing(report, drawn),
        tag("h2", "Samples as the model gets them"),
        *_samples(report, samples),
        tag("h2", "Records that are dropped"),
        *dropped_records(report),
        tag("h2", "Pictures"),
        *pictures(report, thumbnails),
        tag("h2", "Texts and duplicates"),
        *texts_and_duplicates(report),
    )


def _head(report: dict, config: DataConfig) -> list[Html]:
    verdict = report["verdict"]
    tiling = config.tiling
    settings = (
        f"template {config.version}, model_max_length {config.model_max_length}, image_aspect_ratio"
        f" {config.image_aspect_ratio}, {tiling.tile_tokens} positions for each {tiling.tile_size} pixel tile,"
        f" tokenizer {config.tokenizer_path}"
    )
    words = "can be trained on" if verdict == "fine" else "refused"
    return [
        tag("h1", "Preflight of ", config.data_path),
        tag("p", tag("span", words, kind=f"verdict {verdict}")),
        tag("p", settings, kind="left"),
        *(
            tag("div", tag("b", finding["level"]), ": ", finding["text"], kind=f"finding {finding['level']}")
            for finding in report["findings"]
        ),
    ]


def _data(report: dict) -> list[Html]:
    heading = ("file", "records", "kept", "dropped", "cut", "pictures", "videos", "text only", "positions", "targets")
    rows = [(source_name(source, 80), *source_cells(source)) for source in report["sources"]]
    if len(rows) > 1:
        rows.append((tag("b", "total"), *source_cells(report["total"])))
    total = report["total"]
    kept = max(total["kept"], 1)
    kinds = (
        ("text only", "text_only"),
        ("with one picture", "one_image"),
        ("with several pictures", "several_images"),
        ("with a video", "with_video"),
    )
    modality = ", ".join(
        f"{count(total[key])} {words} ({percent(total[key] / kept)})" for words, key in kinds if total[key]
    )
    lines = [f"Samples: {modality}. {count(total['different_images'])} different pictures."] if total["kept"] else []
    if total["dropped"]:
        reasons = ", ".join(f"{count(number)} x {reason}" for reason, number in total["dropped_by_reason"].items())
        lines.append(f"Dropped: {reasons}.")
    return [cells_table(heading, rows, numbers=True), *(tag("p", line) for line in lines)]


def _packing(report: dict, drawn: dict[str, str]) -> list[Html]:
    if not report["packing"]:
        return [tag("p", "Nothing is left to train on."), *_advice(report)]
    heading, *rows = packing_rows(report)
    limits = [one["model_max_length"] for one in report["cut"]]
    cut = [percent(one["share"]) for one in report["cut"]]
    figures = [_figures(name, report["lengths"][key]) for name, key in _FIGURES]
    samples = several(report["packing"]["samples"], "sample")
    epoch = f"An epoch has {samples}, weights counted."
    if report["packing"]["estimated"]:
        epoch += " A random part of it was packed; numbers of rows are scaled."
    return [
        *_advice(report),
        cells_table(heading, rows, numbers=True),
        tag("p", epoch, kind="left"),
        cells_table(("--model_max_length", *limits), [("samples it cuts", *cut)], numbers=True),
        cells_table(("a sample", "mean", "median", "95 % are at most", "longest"), figures, numbers=True),
        tag("div", *(image(drawn[name], name) for name in _ORDER if name in drawn), kind="plots"),
    ]


def _advice(report: dict) -> list[Html]:
    flags = (("--seq-length", "seq_length"), ("--model_max_length", "model_max_length"))
    given = [(flag, report["suggestions"][name]) for flag, name in flags if name in report["suggestions"]]
    return [tag("p", tag("code", f"{flag} {one['value']}"), ": ", one["why"], ".") for flag, one in given]


def _figures(name: str, figures: dict) -> tuple[str, ...]:
    return (name, *(count(figures[key]) for key in ("mean", "median", "p95", "max")))


def _samples(report: dict, samples: Sequence[ShownSample]) -> list[Html]:
    if not samples:
        return [tag("p", "There is none.")]
    legend = joined(
        [
            "Text is decoded from the ids of the index. ",
            tag("span", "Green", kind="target"),
            " is what the model is trained to say, ",
            tag("span", "blue", kind="picture"),
            " stands for a picture. Line feeds are shown as ",
            tag("span", "\u21b5", kind="line"),
            ".",
        ]
    )
    return [tag("p", legend), *(_sample(report, one) for one in samples)]


def _sample(report: dict, shown: ShownSample) -> Html:
    sample = shown.sample
    where = f"{file_of(report, sample.source)} record {sample.record}, id {one_line(sample.identifier, 80)}"
    numbers = (
        f"{several(sample.length, 'position')}, {several(len(sample.input_ids) - len(sample.images), 'text token')},"
        f" {several(sample.supervised_tokens, 'target')}, {several(len(sample.images), 'picture')}"
    )
    thumbs = [thumb(uri, _about(picture)) for picture, uri in shown.pictures]
    return tag(
        "div",
        tag("h3", where),
        tag("p", numbers, kind="left"),
        tag("div", *thumbs, kind="thumbs") if thumbs else "",
        tag("div", *map(_piece, shown.pieces), kind="text"),
        kind="sample",
    )


def _about(picture: Picture) -> str:
    size = f"{picture.width} x {picture.height}, {several(picture.tiles, 'tile')}"
    return f"{name_of(picture.name)}{of_frame(picture.frame)}: {size}"


def _piece(piece: Piece) -> Html:
    if piece.picture is not None:
        name = one_line(piece.picture.name, 60)
        words = f"[{name}{of_frame(piece.picture.frame)}: {several(piece.picture.tokens, 'position')}]"
        return tag("span", words, kind="picture")
    text = piece.text
    left = len(text) - _LONGEST_PIECE
    if left > 0:
        text = text[:_LONGEST_PIECE]
    lines = joined(text.split("\n"), tag("span", "\u21b5", kind="line") + "\n")
    more = tag("span", f" ... {several(left, 'more character')}", kind="line") if left > 0 else ""
    return tag("span", lines, more, kind="target") if piece.target else joined([lines, more])
