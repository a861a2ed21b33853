"""How the demo's result is told: a table in the terminal, a picture grid, a page, and the bare numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console

from rtlynx.demo.images import to_pil
from rtlynx.demo.run import DemoResult, Outcome
from rtlynx.report import Column, Page, picture_grid, terminal_table, write_image, write_json, write_text
from rtlynx.version import __version__

SHOWN_PROMPTS = 8

COLUMNS = (
    Column("title", "method", numeric=False),
    Column(
        "velocity_rel_err",
        "velocity error",
        "{:.1%}",
        "How far the velocity the model predicts is from the dense model's, relative to its length, at the noisy pictures the dense model "
        "passed through. Lower is better.",
    ),
    Column(
        "psnr_db",
        "PSNR (dB)",
        "{:.1f}",
        "Likeness of the finished picture to the dense one of the same prompt and noise. Higher is better; a difference of the whole "
        "trajectory, so it says nothing about which of two pictures is the nicer.",
    ),
    Column(
        "attribute_accuracy",
        "accuracy",
        "{:.1%}",
        "Share of the asked shapes, colours and backgrounds that a classifier, trained on drawn pictures, finds in the sampled ones.",
    ),
    Column("step_ms", "step (ms)", "{:.1f}", "Median time of one denoising step of one batch."),
    Column(
        "sparse_flops_share",
        "sparse FLOPs",
        "{:.0%}",
        "Share of the multiply-adds of the model's linear layers that a sparse tensor core does at double rate.",
    ),
)

KEYS = ("velocity_rel_err", "psnr_db", "attribute_accuracy", "step_ms", "sparse_flops_share")
"""The measurements in demo.json, beside ``method``."""


def write_result(result: DemoResult, folder: Path) -> list[Path]:
    """Write demo.png, demo.html and demo.json.

    Returns:
        The files written.
    """
    picture, page, numbers = folder / "demo.png", folder / "demo.html", folder / "demo.json"
    rows = [to_pil(outcome.pictures[:SHOWN_PROMPTS]) for outcome in result.outcomes]
    titles = [outcome.method.title for outcome in result.outcomes]
    write_image(picture, picture_grid(rows, titles, result.prompts[:SHOWN_PROMPTS]))
    write_text(page, _page(result, rows, titles))
    write_json(numbers, [{"method": outcome.method.name, **_measurements(outcome)} for outcome in result.outcomes])
    return [picture, page, numbers]


def print_result(result: DemoResult, files: Sequence[Path], console: Console) -> None:
    """Print the table, what ran, and where the files are."""
    console.print(terminal_table(COLUMNS, _rows(result), title=_what_ran(result), caption=_caption(result)))
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)


def _measurements(outcome: Outcome) -> dict[str, float | None]:
    return {key: getattr(outcome, key) for key in KEYS}


def _rows(result: DemoResult) -> list[dict[str, Any]]:
    return [{"title": outcome.method.title, **_measurements(outcome)} for outcome in result.outcomes]


def _what_ran(result: DemoResult) -> str:
    if result.place.on_gpu:
        return f"{result.place.name}, bfloat16, kernels: {', '.join(result.kernels)}"
    return f"{result.place.name}, float32, CPU reference"


def _caption(result: DemoResult) -> str:
    count = len(result.prompts)
    caption = f"{count} prompts, {result.settings.steps} steps, rank {result.settings.rank}, seed {result.settings.seed}; "
    caption += f"a step is a batch of {min(result.place.batch, count)}. "
    if result.place.on_gpu:
        return caption + "A model this small is bound by launches, not by arithmetic: its step time says nothing about large models."
    return caption + "The CPU reference defines what the kernels compute; it is not built for speed, so its step time says nothing."


def _page(result: DemoResult, rows: Sequence[Sequence[Any]], titles: Sequence[str]) -> str:
    page = Page(
        "Sparse activations, side by side",
        f"A diffusion transformer with {result.parameters / 1e6:.1f} million parameters, sampled densely and with half of its activations "
        "dropped in every sparse layer. Same prompts, same noise, same weights in every row.",
    )
    page.pictures(rows, titles, result.prompts[:SHOWN_PROMPTS], caption=_more_prompts(result))
    page.heading("Measured")
    page.table(COLUMNS, _rows(result), caption=f"{_what_ran(result)}. {_caption(result)}")
    page.heading("What the rows are")
    page.paragraph(
        "A linear layer computes `Y = X W`. Here its input `X` is made 2:4 sparse on the fly: of every four neighbouring channels of a "
        "token only the two largest are kept, `S(X)`, which sparse tensor cores multiply at twice the dense rate. The weights stay as "
        "they are. What selection drops is made up for in steps:"
    )
    page.definitions({outcome.method.title: outcome.method.about for outcome in result.outcomes})
    page.heading("Made with")
    page.definitions(
        {
            "ran on": _what_ran(result),
            "model": f"`{result.settings.model}`",
            "software": f"rtlynx {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
            f"Python {platform.python_version()}",
            "took": f"{result.seconds:.0f} s",
        }
    )
    return page.html()


def _more_prompts(result: DemoResult) -> str:
    hidden = len(result.prompts) - SHOWN_PROMPTS
    return f"The first {SHOWN_PROMPTS} of {len(result.prompts)} prompts; the table counts all of them." if hidden > 0 else ""
