"""model.csv: steps of several models in one file, each with the run it is from; and its picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtlynx.bench.step import StepTimes
from rtlynx.io import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "gemm_ms": ("linear layers", "#2f6fb7"),
    "select_ms": ("selection", "#d9b26f"),
    "attention_ms": ("attention", "#7fb3e6"),
    "other_ms": ("everything else", "#c9c9c9"),
}
"""Column → its label and colour in the picture, from the bottom up."""


def label(row: StepTimes) -> str:
    """What rows of one run have in common."""
    return f"{row.model} {row.height}x{row.width}"


def write_steps(path: Path, notes: Iterable[str], rows: Sequence[StepTimes]) -> None:
    """Put the rows of one run into a file, in place of earlier ones of the same model and size; the others stay, with their notes.

    Every ``#`` line of the header begins with the `label` of the rows it is about.
    """
    mine = {label(row) for row in rows}
    old_notes, old_rows = read_steps(path) if path.exists() else ([], [])
    lines = [line for line in old_notes if line.partition(": ")[0] not in mine] + [
        f"{name}: {note}" for name in sorted(mine) for note in notes
    ]
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in lines)
    writer = csv.DictWriter(text, [field.name for field in fields(StepTimes)], lineterminator="\n")
    writer.writeheader()
    for row in (*(row for row in old_rows if label(row) not in mine), *rows):
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()})
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())


def read_steps(path: Path) -> tuple[list[str], list[StepTimes]]:
    """The header's lines and the rows."""
    lines = path.read_text().splitlines()
    notes = [line[2:] for line in lines if line.startswith("# ")]
    convert: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": lambda text: text == "True"}
    kinds = {field.name: convert[str(field.type)] for field in fields(StepTimes)}
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    return notes, [StepTimes(**{key: kinds[key](value) for key, value in row.items()}) for row in reader]


def draw_steps(rows: Sequence[StepTimes]) -> Figure:
    """A bar for every mode of every model, made of what its time went to; on it the speedup.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(label(row) for row in rows))
    figure = Figure(figsize=(max(5.0, 0.9 * len(rows)), 4.4), layout="constrained")
    widths = [sum(label(row) == model for row in rows) for model in models]
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False, width_ratios=widths)[0], models, strict=True):
        bars = [row for row in rows if label(row) == model]
        bottom = [0.0] * len(bars)
        for column, (name, colour) in PARTS.items():
            heights = [max(0.0, getattr(row, column)) for row in bars]
            axes.bar(range(len(bars)), heights, 0.7, bottom, label=name, color=colour)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for x, (row, top) in enumerate(zip(bars, bottom, strict=True)):
            axes.annotate(f"{row.speedup:.2f}×", (x, top), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(bars)), [f"{row.mode}\n{'compiled' if row.compiled else 'eager'}" for row in bars], fontsize=8)
        axes.set_title(model, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms per step")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def save_picture(csv_path: Path) -> Path:
    """Draw a file's rows beside it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context

    path = csv_path.with_suffix(".svg")
    figure = draw_steps(read_steps(csv_path)[1])
    with atomic_path(path) as temporary, rc_context({"svg.hashsalt": "rtlynx"}):  # a date and random ids would make equal pictures differ
        figure.savefig(temporary, metadata={"Date": None})
    return path
