"""The preflight page's lists: records that are dropped, pictures that are odd or broken, what is there twice."""

from __future__ import annotations

from collections.abc import Sequence

from dc_megatron.reports.html_parts import Html, cells_table, folded, image, joined, tag
from dc_megatron.reports.preflight_text import source_name
from dc_megatron.reports.words import count, one_line, several

# Entries of a list that the page shows; --json has more.
MOST_SHOWN = 20


def dropped_records(report: dict) -> list[Html]:
    """Every reason with its first records."""
    reasons = report["total"]["dropped_by_reason"]
    if not reasons:
        return [tag("p", "None.")]
    shown: dict[str, list[dict]] = {reason: [] for reason in reasons}
    for fault in report["dropped_records"]:
        if len(shown[fault["reason"]]) < MOST_SHOWN:
            shown[fault["reason"]].append(fault)
    return [
        _list(
            f"{reason}: {several(reasons[reason], 'record')}",
            ("what was seen",),
            [(*_where(report, fault), fault["detail"]) for fault in faults],
            reasons[reason],
        )
        for reason, faults in shown.items()
    ]


def pictures(report: dict, thumbnails: dict[str, list[tuple[dict, str]]]) -> list[Html]:
    """What decoding found, and odd pictures by kind. thumbnails: (entry, data URI) by kind."""
    done = report["decoding"]
    line = (
        f"{count(done['checked'])} of {several(done['pictures'], 'different picture')} decoded whole:"
        f" {count(done['failed'])} failed, {count(done['resized'])} with another size than the index has."
    )
    parts = [tag("p", line)]
    for title, entries, number in (
        ("Cannot be decoded", done["failures"], done["failed"]),
        ("Decoded to another size", done["other_sizes"], done["resized"]),
    ):
        rows = [
            (*_where(report, one), f"{name_of(one['name'])}{of_frame(one['frame'])}", one["reason"])
            for one in entries[:MOST_SHOWN]
        ]
        if rows:
            parts.append(_list(f"{title}: {count(number)}", ("picture", "what happened"), rows, number))
    if not report["odd_pictures"]:
        parts.append(tag("p", "No odd ones: no CMYK, nothing turned by EXIF, none tiny or huge, no GIF."))
    for kind, odd in report["odd_pictures"].items():
        thumbs = [
            thumb(uri, f"{name_of(entry['name'])} ({file_of(report, entry['source'])} record {entry['record']})")
            for entry, uri in thumbnails.get(kind, [])
        ]
        parts += [tag("h3", f"{odd['what']}: {count(odd['count'])}"), tag("div", *thumbs, kind="thumbs")]
    return parts


def texts_and_duplicates(report: dict) -> list[Html]:
    """Words of templates, ``<image>`` in answers, and records that are there twice."""
    parts = [*_marks(report), *_duplicates(report)]
    return parts or [tag("p", "No duplicates, and no words of templates inside of messages.")]


def thumb(uri: str, words: str) -> Html:
    """A small picture with words below it; uri "": it could not be had."""
    shown = image(uri, words) if uri else tag("span", "not shown", kind="none")
    return tag("div", shown, words, kind="thumb")


def file_of(report: dict, source: int) -> str:
    """The data file of a source."""
    return source_name({**report["sources"][source], "weight": 1}, 60)


def name_of(text: str) -> str:
    """A name or id out of the data, shortened."""
    return one_line(text, 120)


def of_frame(frame: int) -> str:
    """`` frame N`` for a frame of a video."""
    return f" frame {frame}" if frame >= 0 else ""


def _marks(report: dict) -> list[Html]:
    parts = []
    rows = [
        (*_where(report, one), mark, count(of["records"]), one["text"])
        for mark, of in report["template_marks"]["marks"].items()
        for one in of["examples"]
    ]
    if rows:
        title = f"Words of templates inside of messages: {several(report['template_marks']['records'], 'record')}"
        parts.append(_list(title, ("words", "records with them", "for example"), rows[: 2 * MOST_SHOWN]))
    answers = report["answers_with_image"]
    rows = [(*_where(report, one), one["text"]) for one in answers["examples"]]
    if rows:
        title = f"<image> inside an answer: {several(answers['records'], 'record')}"
        parts.append(_list(title, ("for example",), rows, answers["records"]))
    return parts


def _duplicates(report: dict) -> list[Html]:
    content, ids = report["duplicates"]["content"], report["duplicates"]["ids"]
    groups = f"{several(content['groups'], 'group')}, {several(content['extra'], 'record')} too many"
    parts = []
    for title, number, found in (
        (f"The same pictures and messages more than once: {groups}", content["groups"], content),
        (f"Ids that stand for different conversations: {count(ids['ids'])}", ids["ids"], ids),
    ):
        rows = [(count(one["records"]), _places(report, one)) for one in found["examples"][:MOST_SHOWN]]
        if rows:
            table = cells_table(("records", "where"), rows)
            parts.append(folded(title, table, _left(number - len(rows)), is_open=found is content))
    return parts


def _places(report: dict, group: dict) -> Html:
    words = []
    for one in group["places"]:
        of_id = f" (id {name_of(one['id'])})" if one["id"] else ""
        words.append(f"{file_of(report, one['source'])} record {one['record']}{of_id}")
    more = group["records"] - len(words)
    return joined([*words, f"{more} more"] if more > 0 else words, "; ")


def _where(report: dict, entry: dict) -> tuple:
    return file_of(report, entry["source"]), entry["record"], name_of(entry["id"])


def _list(title: str, columns: Sequence[str], rows: Sequence[tuple], number: int = 0) -> Html:
    """Rows that begin with ``_where``; ``number``: how many there are in all."""
    table = cells_table(("file", "record", "id", *columns), rows)
    return folded(title, table, _left(number - len(rows)), is_open=True)


def _left(number: int) -> Html:
    return tag("p", f"and {count(number)} more (--json lists them)", kind="left") if number > 0 else Html()
