"""The trade of error against time as a picture. matplotlib is an optional dependency: ``pip install "rtlynx[search]"``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rtlynx.io import atomic_path

if TYPE_CHECKING:
    from rtlynx.search.search import Point


def plot_pareto(points: Sequence[Point], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw measured points, the curve of the budgets, and what the probes predicted for it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curve = sorted((p for p in points if p.name == "found" or p.name.startswith("budget")), key=lambda p: p.share)
    axes.plot([100 * p.share for p in curve], [100 * p.measured for p in curve], "o-", color="#2f6fb7", label="searched, measured")
    axes.plot([100 * p.share for p in curve], [100 * p.predicted for p in curve], ":", color="#7fb3e6", label="searched, predicted")
    for p in points:
        if p not in curve:
            axes.plot(100 * p.share, 100 * p.measured, "s", color="#9a9a9a")
            axes.annotate(p.name, (100 * p.share, 100 * p.measured), xytext=(6, 4), textcoords="offset points", fontsize=8, color="#555555")
    for p in points:
        if p.name == "found":
            axes.plot(100 * p.share, 100 * p.measured, "*", color="#c0392b", markersize=14, label="found")
    axes.set(xlabel="time of the layers, % of dense", ylabel="error of the model's output, %", title=title)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary, rc_context({"svg.hashsalt": "rtlynx"}):
        figure.savefig(temporary, metadata={"Date": None} if os.fspath(path).endswith(".svg") else None)
