"""The laws of lorafit.evaluate.markup: whatever text the data holds is text on the page."""

from __future__ import annotations

from html import unescape
from html.parser import HTMLParser

import pytest

from lorafit.evaluate.markup import both, counted, esc, fact_table, plainly


@pytest.mark.parametrize(
    "text", ["<script>", "a & b", "'\"", "</title><img src=x onerror=y>", "日本 🎉", "a\tb\nc", ""]
)
def test_text_comes_back_as_it_was(text):
    """Escaped it holds no tag and no quote that ends an attribute; unescaped it is the text."""
    assert unescape(esc(text)) == text
    assert not set("<>\"'") & set(esc(text))


def test_what_no_page_may_hold_is_shown_as_a_picture():
    """Control characters as their pictures, half a surrogate pair as a question mark: UTF-8 can write it."""
    assert esc("\x00\x1b[31m\r") == "␀␛[31m␍"
    assert esc("\ud800").encode("utf-8") == b"?"


def test_a_table_of_facts_has_a_row_each():
    """Keys with spaces, values as people read them, both escaped."""
    cells: list[str] = []

    class Cells(HTMLParser):
        def handle_data(self, data: str) -> None:
            cells.append(data)

    Cells().feed(fact_table([("max_length", None), ("<b>", ["x", "<y>"])]))
    assert cells == ["max length", "none", "<b>", "x, <y>"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "none"), (True, "yes"), (False, "no"), ((), "none"), (("a", "b"), "a, b"), (0.00198, "0.00198"), (3, "3")],
)
def test_settings_are_shown_as_people_read_them(value, shown):
    """No Python on the page."""
    assert plainly(value) == shown


def test_numbers_of_things_and_drawings_for_two_widths():
    """One row, two rows; nothing drawn is nothing on the page."""
    assert (counted(1, "row"), counted(2000, "row")) == ("1 row", "2,000 rows")
    assert both(lambda width: "") == ""
    assert both(str) == "<div class=wide-only>860</div><div class=narrow>360</div>"
