"""Result files: labelled grids, tables, pages that need nothing from outside, JSON that every parser reads."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from rich.console import Console

from rtlynx.report import Column, Page, picture_grid, terminal_table, write_image, write_json

COLUMNS = (
    Column("method", "method", numeric=False),
    Column("error", "error", "{:.1%}", note="Relative error; lower is better."),
)
ROWS = ({"method": "dense", "error": None}, {"method": "naive <2:4> [red]", "error": 0.361})


def solid(color: str, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), color)


class Document(HTMLParser):
    """Tags and attributes of a page, and whether every element that was opened was closed."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_grid_puts_every_picture_in_its_cell() -> None:
    colors = [["red", "lime", "blue"], ["black", "yellow", "magenta"]]
    sheet = picture_grid([[solid(c) for c in row] for row in colors], ["first", "second"], ["a", "b", "c"], cell=32)
    for color in ("red", "lime", "blue", "black", "yellow", "magenta"):
        tops, lefts = np.nonzero((np.asarray(sheet) == ImageColor.getrgb(color)).all(-1))
        assert len(tops) == 32 * 32
        row, column = next((r, c) for r, line in enumerate(colors) for c, name in enumerate(line) if name == color)
        left, top = lefts.min(), tops.min()
        assert (sheet.width - left - 20 + 6) // 38 == 3 - column  # counted from the right margin: 32 + gap of 6 each
        assert (sheet.height - top - 20 + 6) // 38 == 2 - row


def test_grid_grows_with_its_labels() -> None:
    narrow = picture_grid([[solid("red")]], ["a"], ["x"], cell=48)
    assert picture_grid([[solid("red")]], ["a much longer label"], ["x"], cell=48).width > narrow.width
    assert picture_grid([[solid("red")]], ["a"], ["words that need several lines"], cell=48).height > narrow.height


def test_grid_refuses_rows_that_do_not_match_their_labels() -> None:
    with pytest.raises(ValueError, match="2 x 1 labels"):
        picture_grid([[solid("red")]], ["one", "two"], ["x"])


def test_terminal_table_shows_values_and_absences() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(COLUMNS, ROWS, title="results", caption="measured here"))
    text = console.export_text()
    for part in ("results", "measured here", "36.1%", "–", "naive <2:4> [red]"):
        assert part in text


def page() -> Page:
    page = Page("A & B", "Lead with `code` & <angle> brackets.")
    page.heading("Pictures")
    page.pictures([[solid("red"), solid("blue")]], ["dense"], ["a red circle", "a blue square"], caption="Same seeds.")
    page.table(COLUMNS, ROWS, caption="n = 2")
    page.definitions({"device": "cpu"})
    page.paragraph("Last.")
    return page


def test_page_is_well_formed_and_escapes_text() -> None:
    html = page().html()
    assert Document(html).open == []
    assert "Lead with <code>code</code> &amp; &lt;angle&gt; brackets." in html
    assert "naive &lt;2:4&gt;" in html
    assert "<title>A &amp; B</title>" in html


def test_page_needs_nothing_from_outside() -> None:
    html = page().html()
    assert not re.search(r"https?:|@import|url\(|<script|<link", html)
    sources = [value for _, name, value in Document(html).attributes if name in ("src", "href")]
    assert len(sources) == 2
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) for source in sources]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]


def test_json_has_no_infinities(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [{"psnr_db": math.inf, "error": 0.5, "nested": (math.nan, 1)}])
    strict = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert strict == [{"psnr_db": None, "error": 0.5, "nested": [None, 1]}]


def test_an_image_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    write_image(target, solid("red"))
    before = target.read_bytes()
    with pytest.raises(OSError):
        write_image(target, Image.new("F", (4, 4)))  # PNG has no floating-point mode
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
