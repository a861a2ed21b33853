"""What an evaluation leaves behind: eval.html (pictures, table, plots), eval.csv, eval_layers.csv and eval_steps.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rtlynx.evaluate.bootstrap import Interval
from rtlynx.evaluate.evaluate import Evaluation, Way
from rtlynx.report import Column, Page, write_text

_SHOWN_PROMPTS = 8

COLUMNS = (
    Column("name", "model", numeric=False),
    Column(
        "velocity",
        "velocity error",
        note="‖v - v_dense‖ / ‖v_dense‖ where the dense model went, with its 95 % bootstrap interval over prompts.",
    ),
    Column("psnr_db", "PSNR (dB)", note="Mean over pictures, against the dense picture of the same prompt and noise. Higher is closer."),
    Column("ssim", "SSIM", note="Structural similarity to the dense picture, at most 1."),
    Column("seconds", "seconds", "{:.2f}", "Time to sample all prompts, the first batch left out as a warm-up where there are more."),
)


def table_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row a way, figures with their intervals as text."""
    rows = []
    for way in evaluation.ways:
        row: dict[str, Any] = {"name": way.name, "seconds": way.seconds}
        row |= {name: _with_interval(value, "{:.4g}") for name, value in way.learned.items()}
        row["velocity"] = _with_interval(way.velocity, "{:.2%}")
        row["psnr_db"] = _with_interval(way.psnr_db, "{:.2f}")
        row["ssim"] = _with_interval(way.ssim, "{:.4f}")
        rows.append(row)
    return rows


def columns(evaluation: Evaluation) -> list[Column]:
    """The table's columns, with one for every further metric that was asked for."""
    names = dict.fromkeys(name for way in evaluation.ways for name in way.learned)
    return [*COLUMNS, *(Column(name, name) for name in names)]


def write_report(evaluation: Evaluation, folder: Path, settings: dict[str, str]) -> list[Path]:
    """Write all files.

    Args:
        evaluation: What was found.
        folder: Where to.
        settings: What was compared with what, for the page.

    Returns:
        The files written.
    """
    files = {
        "eval.html": _page(evaluation, settings),
        "eval.csv": _csv(("name", "figure", "value", "low", "high"), _figures(evaluation)),
        "eval_layers.csv": _csv(("layer", "rel_err"), [{"layer": k, "rel_err": v} for k, v in evaluation.layer_errors.items()]),
        "eval_steps.csv": _csv(
            ("name", "call", "velocity_rel_err"),
            [{"name": w.name, "call": call, "velocity_rel_err": v} for w in evaluation.ways for call, v in w.velocity_by_step.items()],
        ),
    }
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def _page(evaluation: Evaluation, settings: dict[str, str]) -> str:
    page = Page("Sparse against dense", "The same prompts and the same noise, sampled with the dense model and with the sparse one.")
    page.table(columns(evaluation), table_rows(evaluation), caption=f"{len(evaluation.prompts)} prompts, {evaluation.steps} steps")
    page.heading("Pictures")
    shown = [_images(way) for way in evaluation.ways]
    page.pictures(shown, [way.name for way in evaluation.ways], list(evaluation.prompts[:_SHOWN_PROMPTS]))
    plots = _plots(evaluation)
    if plots:
        page.heading("Where the error is")
        page.pictures([[plot] for plot in plots.values()], list(plots), [""])
    page.heading("Made with")
    page.definitions(settings)
    return page.html()


def _plots(evaluation: Evaluation) -> dict[str, Image.Image]:
    """By step and by layer; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    by_step, by_layer = Figure(figsize=(7, 3), layout="constrained"), Figure(figsize=(7, 3), layout="constrained")
    axes = by_step.subplots()
    for way in evaluation.ways:
        if way.velocity_by_step:
            axes.plot(list(way.velocity_by_step), list(way.velocity_by_step.values()), marker=".", label=way.name)
    axes.set(xlabel="call of the model", ylabel="velocity error", ylim=(0, None))
    axes.legend()
    axes = by_layer.subplots()
    axes.bar(range(len(evaluation.layer_errors)), list(evaluation.layer_errors.values()))
    axes.set(xlabel="sparse layer, in the model's order (names in eval_layers.csv)", ylabel="output error")
    pictures: dict[str, Image.Image] = {}
    for name, figure in (("by step", by_step), ("by layer", by_layer)):
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        pictures[name] = Image.open(buffer)
    return pictures


def _images(way: Way) -> list[Image.Image]:
    return [_image(picture if picture.dim() == 3 else picture[0]) for picture in way.pictures[:_SHOWN_PROMPTS]]


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def _figures(evaluation: Evaluation) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for way in evaluation.ways:
        found = {name: value for name in ("velocity", "psnr_db", "ssim") if (value := getattr(way, name)) is not None}
        for name, value in [*found.items(), ("seconds", way.seconds), *way.learned.items()]:
            figures = value._asdict() if isinstance(value, Interval) else {"value": value}
            rows.append({"name": way.name, "figure": name, **figures})
    return rows


def _csv(fields: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _with_interval(value: Interval | float | None, form: str) -> str | None:
    if isinstance(value, Interval):
        return f"{form.format(value.value)} [{form.format(value.low)}, {form.format(value.high)}]"
    return None if value is None else form.format(value)
