"""Numbers and foreign texts in reports."""

from __future__ import annotations

import pytest

from dc_megatron.reports.html_parts import Html, cells_table, escaped, image
from dc_megatron.reports.words import count, one_line, percent, several, short_count, visible


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0 %"), (1e-6, "0.0001 %"), (0.0123, "1.2 %"), (0.98, "98.0 %"), (0.99999, "99.9 %"), (1, "100.0 %")],
)
def test_percent_is_neither_nothing_nor_all_by_rounding(share, words):
    assert percent(share) == words


def test_counts():
    assert (count(1234567), short_count(99_999), short_count(150_000)) == ("1,234,567", "99,999", "150 k")
    assert (short_count(518_000_000), short_count(5_180_000)) == ("518 M", "5.2 M")
    assert (several(1, "id stands", "ids stand"), several(2, "record")) == ("1 id stands", "2 records")


def test_what_would_do_something_is_spelled():
    assert visible("a\x1b[31m\u202eb\ud800\0") == "a\\x1b[31m\\u202eb\\ud800\\x00"
    assert visible("a\u00a0größe 熊 🐻\n", keep="\n") == "a\u00a0größe 熊 🐻\n"
    assert one_line("a\nb" + "x" * 500, 20) == "a\\nb" + "x" * 14 + "..."


def test_strings_are_data_and_only_html_is_markup():
    assert escaped("<b a=\"1\" c='2'>&") == "&lt;b a=&quot;1&quot; c=&#x27;2&#x27;&gt;&amp;"
    assert escaped(Html("<b>")) == "<b>"
    table = cells_table(("<i>",), [("<u>",), (Html("<b>x</b>"),)])
    assert "<i>" not in table
    assert "<u>" not in table
    assert "<b>x</b>" in table
    # What strings are made of Html is data again.
    assert escaped(Html("<b>") + "<i>") == "&lt;b&gt;&lt;i&gt;"


@pytest.mark.parametrize(
    "uri", ["http://x/y.png", 'data:image/png;base64,AA" onerror="x', "data:text/html;base64,AA=="]
)
def test_only_pictures_made_here_are_shown(uri):
    with pytest.raises(AssertionError):
        image(uri, "words")
