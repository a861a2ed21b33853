"""Pictures side by side with labels, as one image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK = (28, 28, 30)
PAPER = (255, 255, 255)
GAP = 6
MARGIN = 20
LABEL_SIZE = 15


def picture_grid(
    pictures: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int = 128,
) -> Image.Image:
    """Lay pictures out as labelled rows and columns.

    Args:
        pictures: Rows of pictures; every row has one picture per column label.
        row_labels: One line each, printed left of the row.
        column_labels: Printed above the columns, wrapped to their width.
        cell: Width and height of a picture in pixels; pictures are scaled to it.

    Raises:
        ValueError: The labels and pictures do not match in number.
    """
    if len(pictures) != len(row_labels) or any(len(row) != len(column_labels) for row in pictures):
        raise ValueError(f"a grid of {len(row_labels)} x {len(column_labels)} labels got rows of {[len(row) for row in pictures]} pictures")
    font = ImageFont.load_default(LABEL_SIZE)
    small = ImageFont.load_default(LABEL_SIZE - 3)
    line = LABEL_SIZE + 1
    headings = [_wrap(label, small, cell) for label in column_labels]
    left = MARGIN + max((int(font.getlength(label)) for label in row_labels), default=0) + 2 * GAP
    top = MARGIN + line * max((len(lines) for lines in headings), default=0) + GAP
    width = left + len(column_labels) * (cell + GAP) - GAP + MARGIN
    height = top + len(row_labels) * (cell + GAP) - GAP + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        first = top - GAP - line * len(lines)  # headings stand on the pictures, whatever their number of lines
        for number, text in enumerate(lines):
            draw.text((left + column * (cell + GAP), first + number * line), text, fill=INK, font=small)
    for number, (label, row) in enumerate(zip(row_labels, pictures, strict=True)):
        y = top + number * (cell + GAP)
        draw.text((MARGIN, y + cell // 2), label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(row):
            scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(scaled, (left + column * (cell + GAP), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break at spaces so that every line fits ``width`` pixels; a longer word stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
