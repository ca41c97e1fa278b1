"""A preflight's report as one screen of text."""

from __future__ import annotations

from dc_megatron.reports.words import count, one_line, percent, several, short_count

_NAME = 36
_MOST_FINDING = 320
_COLUMNS = ("records", "kept", "dropped", "cut", "pictures", "videos", "text only", "positions", "targets")


def as_text(report: dict) -> str:
    """The report in lines."""
    return "\n".join(
        [
            *_sources(report),
            "",
            *_packing(report),
            "",
            *(f"{finding['level']}: {_shortened(finding['text'])}" for finding in report["findings"]),
            _index_line(report),
            f"page: {one_line(report['page'], 300)}",
            _verdict(report),
        ]
    )


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells in aligned columns, the first to the left."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def source_name(source: dict, longest: int = _NAME) -> str:
    """The data file, its end where it is too long, and its weight where that is not 1."""
    weight = "" if source["weight"] == 1 else f" x {source['weight']:g}"
    name = one_line(source["data_path"], 10_000)
    room = longest - len(weight)
    return (name if len(name) <= room else f"...{name[-(room - 3) :]}") + weight


def source_cells(source: dict) -> tuple[str, ...]:
    """What _COLUMNS stand for."""
    names = ("records", "kept", "dropped", "truncated", "images", "videos", "text_only")
    return (
        *(count(source[name]) for name in names),
        short_count(source["tokens"]),
        short_count(source["supervised_tokens"]),
    )


def packing_rows(report: dict) -> list[tuple[str, ...]]:
    """Rows of the packing table as cells, its heading first."""
    packing, samples = report["packing"], report["settings"]["samples_per_step"]
    padded = packing["padded"]
    heading = ("rows of", "fill", "rows an epoch", "samples a row", "tiles a row", f"steps of {samples} samples")
    rows = [
        (
            str(row["seq_length"]),
            percent(row["fill"]),
            count(row["rows"]),
            f"{row['samples_per_row']:.1f}",
            f"{row['tiles_per_row_mean']:.1f} (at most {row['tiles_per_row_max']})",
            f"{count(row['steps'])} ({several(row['rows_per_step'], 'row')})",
        )
        for row in packing["rows"]
    ]
    name = f"unpacked, the longest of {padded['batch']}"
    return [heading, *rows, (name, percent(padded["fill"]), count(padded["rows"]), "1", "", count(padded["steps"]))]


def _sources(report: dict) -> list[str]:
    rows = [("data", *_COLUMNS)]
    rows += [(source_name(source), *source_cells(source)) for source in report["sources"]]
    if len(report["sources"]) > 1:
        rows.append(("total", *source_cells(report["total"])))
    return table(rows)


def _packing(report: dict) -> list[str]:
    lines = table(packing_rows(report)) if report["packing"] else ["nothing is left to pack"]
    return [
        *lines,
        *(
            f"--{name.replace('_', '-') if name == 'seq_length' else name} {advice['value']}: {advice['why']}"
            for name, advice in report["suggestions"].items()
        ),
    ]


def _index_line(report: dict) -> str:
    index = report["index"]
    if index["folder"] is None:
        return "index: not kept; with --index-folder DIR, and the same in training, training finds it finished"
    state = "found finished" if index["found"] else "built"
    return f"index: {one_line(index['folder'], 300)} ({state}; training with this --index-folder finds it finished)"


def _verdict(report: dict) -> str:
    if report["verdict"] == "refused":
        number = sum(finding["level"] == "refused" for finding in report["findings"])
        return f"refused: {several(number, 'reason')}, see above"
    return f"fine: {several(report['total']['kept'], 'sample')} to train on"


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_FINDING else f"{text[: _MOST_FINDING - 3]}..."
