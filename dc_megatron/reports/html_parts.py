"""Pieces of a self-contained HTML page. Everything is escaped but what was made here.

Names and texts come out of data that nobody has checked, so a plain string is always data and ``Html`` alone is markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from dc_megatron.reports.words import visible

# No script at all, and nothing from anywhere else, whatever should get past the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_DATA_URI = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+")


class Html(str):
    """Text that is markup already."""


def escaped(value) -> Html:
    """``value`` as markup: as it is if it was made here, else escaped, with hidden characters spelled out."""
    return value if isinstance(value, Html) else Html(html.escape(visible(value, keep="\n\t"), quote=True))


def joined(parts: Iterable, between: str = "") -> Html:
    return Html(between.join(escaped(part) for part in parts))


def tag(name: str, *content, kind: str = "") -> Html:
    """``<name class=kind>content</name>``."""
    of_kind = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{of_kind}>{joined(content)}</{name}>")


def image(uri: str, words: str) -> Html:
    """A picture that was made here; ``words`` say what it is."""
    assert _DATA_URI.fullmatch(uri), "a picture of the page lies in the page"
    return Html(f'<img src="{uri}" alt="{escaped(words)}">')


def cells_table(heading: Sequence, rows: Iterable[Sequence], numbers: bool = False) -> Html:
    """A table; ``numbers``: all columns but the first stand to the right."""
    head = tag("tr", *(tag("th", cell) for cell in heading))
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("table", tag("thead", head), tag("tbody", *body), kind="numbers" if numbers else "")


def folded(title, *content, is_open: bool = False) -> Html:
    """Content below a title that opens and closes it."""
    return Html(f"<details{' open' if is_open else ''}><summary>{escaped(title)}</summary>{joined(content)}</details>")


def document(title: str, style: str, *content) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{joined(content, chr(10))}\n"
        "</body>\n</html>\n"
    )
