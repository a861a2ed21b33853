"""A table of results: columns that know how to print their values, for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

ABSENT = "–"
"""Printed where a row has no value, e.g. the error of the reference against itself."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Where a row keeps the value.
        title: The heading.
        format: A `str.format` template for the value.
        note: One sentence that says what the number means and which direction is better; printed under HTML tables.
        numeric: Right-aligned with figures of equal width.
    """

    key: str
    title: str
    format: str = "{}"
    note: str = ""
    numeric: bool = True

    def text(self, row: Row) -> str:
        """The row's value as it is shown."""
        value = row.get(self.key)
        return ABSENT if value is None else self.format.format(value)


def terminal_table(columns: Sequence[Column], rows: Sequence[Row], *, title: str = "", caption: str = "") -> Table:
    """A rich table, ready to print."""
    table = Table(
        title=title or None, caption=caption or None, caption_justify="left", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        table.add_column(column.title, justify="right" if column.numeric else "left", no_wrap=not column.numeric)
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))  # Text: brackets are not markup
    return table


def html_table(columns: Sequence[Column], rows: Sequence[Row], *, caption: str = "") -> str:
    """The table as HTML, with the columns' notes as a definition list after it."""
    head = "".join(f"<th scope=col{_css(column)}>{escape(column.title)}</th>" for column in columns)
    body = "".join(f"<tr>{_html_cells(columns, row)}</tr>" for row in rows)
    notes = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.note)}</dd>" for c in columns if c.note)
    return (
        f"<figure class=table><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + "</figure>"
        + (f"<dl class=notes>{notes}</dl>" if notes else "")
    )


def _html_cells(columns: Sequence[Column], row: Row) -> str:
    first, *rest = columns
    cells = "".join(f"<td{_css(column)}>{escape(column.text(row))}</td>" for column in rest)
    return f"<th scope=row>{escape(first.text(row))}</th>{cells}"


def _css(column: Column) -> str:
    return " class=number" if column.numeric else ""
