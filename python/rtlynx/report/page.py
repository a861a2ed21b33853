"""A self-contained HTML page: one file, style and pictures inside, nothing fetched when it is read."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from PIL import Image

from rtlynx.report.table import Column, Row, html_table


class Page:
    """Collects sections in reading order; `html` gives the document.

    Text is plain, except that `backticks` mark code.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._body = [f"<header><h1>{escape(title)}</h1><p class=lead>{_prose(lead)}</p></header>"]

    def heading(self, text: str) -> None:
        """A section heading."""
        self._body.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{_prose(text)}</p>")

    def definitions(self, items: Mapping[str, str]) -> None:
        """Terms with a sentence or a value each."""
        rows = "".join(f"<dt>{escape(term)}</dt><dd>{_prose(text)}</dd>" for term, text in items.items())
        self._body.append(f"<dl>{rows}</dl>")

    def table(self, columns: Sequence[Column], rows: Sequence[Row], *, caption: str = "") -> None:
        """A table of results."""
        self._body.append(html_table(columns, rows, caption=caption))

    def pictures(
        self, pictures: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], *, caption: str = ""
    ) -> None:
        """Rows of pictures, one column per label."""
        head = "<td></td>" + "".join(f"<th scope=col>{escape(label)}</th>" for label in column_labels)
        rows = []
        for label, row in zip(row_labels, pictures, strict=True):
            cells = "".join(
                f'<td><img alt="{escape(f"{label}: {column}")}" src="{_data_url(picture)}"></td>'
                for column, picture in zip(column_labels, row, strict=True)
            )
            rows.append(f"<tr><th scope=row>{escape(label)}</th>{cells}</tr>")
        self._body.append(
            f"<figure class=pictures><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            + (f"<figcaption>{_prose(caption)}</figcaption>" if caption else "")
            + "</figure>"
        )

    def html(self) -> str:
        """The whole document."""
        style = files("rtlynx.report").joinpath("page.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._body)
            + "\n</main>\n</body>\n</html>\n"
        )


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
