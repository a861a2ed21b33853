"""Pictures of a result file, beside it: layer times in bars, the GEMM under its limits, or the speedup for every number of tokens.

matplotlib is an optional dependency: ``pip install "rtlynx[bench]"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rtlynx.io import atomic_path
from rtlynx.layer_times import LayerTimes, read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = {
    "dense_ms": ("cuBLAS bf16", "#9a9a9a"),
    "fp8_ms": ("cuBLAS fp8, quantised before", "#d9b26f"),
    "cusparselt_mm_ms": ("cuSPARSELt mm, compressed before", "#c98f8f"),
    "cutlass_mm_ms": ("CUTLASS sparse, compressed before", "#a88fc9"),
    "layer_ms": ("rtlynx, whole layer", "#2f6fb7"),
    "fused_ms": ("rtlynx, one kernel", "#7fb3e6"),
}
"""Column → its label and colour. A column without any figure is left out."""

_MOST_BARS = 24  # layers of a bar chart; more are a table of colours


def plots(csv_path: Path) -> list[Path]:
    """Draw a result file; returns the pictures written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context

    header, rows = read_csv(csv_path)
    if len(rows) > _MOST_BARS:
        figures = {"speedup": speedup_over_tokens(rows)}
    else:
        figures = {"bars": layer_bars(rows), "roofline": roofline(rows, header)}
    written = []
    for name, figure in figures.items():
        figure.suptitle(header.get("gpu", ""), x=0.99, ha="right", fontsize=9, color="#555555")
        path = csv_path.with_name(f"{csv_path.stem}_{name}.svg")
        # A date and random ids would make equal pictures differ.
        with atomic_path(path) as temporary, rc_context({"svg.hashsalt": "rtlynx"}):
            figure.savefig(temporary, metadata={"Date": None})
        written.append(path)
    return written


def layer_bars(rows: Sequence[LayerTimes]) -> Figure:
    """Time of every layer relative to cuBLAS in bfloat16, so that large and small layers fit one picture."""
    figure, axes = _figure(max(7.0, 1.1 * len(rows)), 4.2)
    shown = {key: style for key, style in BARS.items() if any(math.isfinite(getattr(row, key)) for row in rows)}
    width = 0.84 / len(shown)
    for i, (key, (label, colour)) in enumerate(shown.items()):
        places = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(rows))]
        # A peer far slower than cuBLAS would press all other bars flat: it runs out of the picture instead.
        axes.bar(places, [getattr(row, key) / row.dense_ms for row in rows], width, label=label, color=colour)
    for x, row in enumerate(rows):
        place = x + (list(shown).index("layer_ms") - (len(shown) - 1) / 2) * width
        axes.annotate(
            f"{row.speedup:.2f}×", (place, min(row.layer_ms / row.dense_ms, 1.4) + 0.01), ha="center", fontsize=8, color="#2f6fb7"
        )
    axes.set_xticks(range(len(rows)), [f"{row.m}\n{row.n}\n{row.k}" for row in rows], fontsize=8)
    axes.set_xlabel("M, N, K; on the bar the speedup of the whole layer")
    axes.set_ylabel("time / time of cuBLAS bf16")
    axes.set_ylim(0, 1.5)
    axes.axhline(1, color="#444444", linewidth=0.8)
    axes.legend(ncols=len(shown), fontsize=8, frameon=False, loc="upper left")
    return figure


def roofline(rows: Sequence[LayerTimes], header: Mapping[str, str]) -> Figure:
    """The sparse GEMM's rate over its FLOP per byte, under the limits that the same run measured."""
    figure, axes = _figure(7.0, 4.6)
    intensities = [_intensity(row) for row in rows]
    axes.scatter(intensities, [row.gemm_tflops for row in rows], color="#2f6fb7", zorder=3, label="spmm")
    axes.scatter(intensities, [_tflops(row, row.dense_ms) for row in rows], color="#9a9a9a", zorder=3, label="cuBLAS bf16, the same layers")
    keys = [key for key in header if key.startswith("limit ") and key.endswith(", TFLOP/s")]
    limits = {key.removeprefix("limit ").removesuffix(", TFLOP/s"): float(header[key]) for key in keys}
    top = 1.1 * max([*limits.values(), *(row.gemm_tflops for row in rows)])
    left, right = min([100.0, *intensities]), 1.6 * max(intensities)
    for name, tflops in limits.items():
        axes.axhline(tflops, color="#444444", linewidth=0.9, linestyle="--" if name.startswith("dense") else "-")
        axes.annotate(name.replace("_", " "), (right, tflops), ha="right", va="bottom", fontsize=8)
    if "limit copy, GB/s" in header:
        bandwidth = float(header["limit copy, GB/s"]) * 1e-3  # TFLOP/s for each FLOP a byte
        slope = [left * (top / bandwidth / left) ** (i / 50) for i in range(51)]  # curved: only one axis is logarithmic
        axes.plot(slope, [x * bandwidth for x in slope], color="#444444", linewidth=0.9, label="copy bandwidth")
    axes.set(xscale="log", xlim=(left, right), ylim=(0, top))
    axes.set(xlabel="2·M·N·K per byte that must be moved", ylabel="TFLOP/s, 2·M·N·K whatever was skipped")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def speedup_over_tokens(rows: Sequence[LayerTimes]) -> Figure:
    """cuBLAS over the whole layer: a line for every pair of N and K, a column for every number of tokens."""
    from matplotlib.colors import TwoSlopeNorm

    tokens = sorted({row.m for row in rows})
    features = list(dict.fromkeys((row.n, row.k) for row in rows))
    speedup = {((row.n, row.k), row.m): row.speedup for row in rows}
    table = [[speedup.get((pair, m), math.nan) for m in tokens] for pair in features]
    figure, axes = _figure(1.6 + 0.55 * len(tokens), 1.2 + 0.27 * len(features))
    axes.pcolormesh(table, cmap="RdBu", norm=TwoSlopeNorm(1, 0, 2))
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            axes.annotate(f"{value:.2f}", (x + 0.5, y + 0.5), ha="center", va="center", fontsize=7)
    axes.set_xticks([x + 0.5 for x in range(len(tokens))], [str(m) for m in tokens], fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(len(features))], [f"{n} × {k}" for n, k in features], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="M", ylabel="N × K", title="speedup of the whole layer over cuBLAS bf16")
    return figure


def _tflops(row: LayerTimes, ms: float) -> float:
    return 2e-9 * row.m * row.n * row.k / ms


def _intensity(row: LayerTimes) -> float:
    """2·M·N·K over the bytes of values, metadata, weight and output."""
    return 2 * row.m * row.n * row.k / (row.m * row.k * 9 / 8 + 2 * row.n * row.k + 2 * row.m * row.n)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: nothing global, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
