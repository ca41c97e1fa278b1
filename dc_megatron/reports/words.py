"""Numbers and foreign texts as reports show them."""

from __future__ import annotations

import unicodedata

# Control and format characters (those that turn the writing direction among them), halves of surrogate pairs, private
# use, unassigned, separators of lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(value, keep: str = "") -> str:
    """``value`` as text without characters that do something instead of being seen; those are spelled as escapes.

    keep: characters that stay, such as a line feed.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char in keep or _is_seen(char) else _spelled(char) for char in text)


def one_line(value, longest: int = 160) -> str:
    """``value`` as one visible line, shortened."""
    text = str(value)
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return visible(text)


def count(number: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """1234567 -> 1.2 M; numbers below 100,000 in full."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= limit:
            size = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{number / size:.1f} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"
    return count(number)


def percent(share: float) -> str:
    """0.0123 -> 1.2 %; what is small but not nothing keeps two digits."""
    value = 100 * share
    if 0 < value < 1:
        return f"{value:.2g} %"
    # Not quite everything must not read as everything.
    return f"{min(value, 99.9) if share < 1 else value:.1f} %" if value else "0 %"


def several(number: int, one: str, many: str = "") -> str:
    """``1 record``, ``2 records``."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def _is_seen(char: str) -> bool:
    return unicodedata.category(char) not in _HIDDEN


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
