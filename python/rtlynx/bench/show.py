"""A run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from rtlynx.autotune import Tuned
from rtlynx.bench.results import break_even, geometric_mean
from rtlynx.bench.run import Run
from rtlynx.report.table import Column, terminal_table

COLUMNS = (
    *(Column(key, key.upper()) for key in ("m", "n", "k")),
    Column("dense_ms", "cuBLAS ms", "{:.3f}"),
    Column("fp8_ms", "fp8 ms", "{:.3f}"),
    Column("gemm_ms", "GEMM ms", "{:.3f}"),
    Column("gemm_tflops", "TFLOP/s", "{:.0f}"),
    Column("select_ms", "select ms", "{:.3f}"),
    Column("copy_ms", "copy ms", "{:.3f}"),
    Column("layer_ms", "layer ms", "{:.3f}"),
    Column("speedup", "speedup", "{:.2f}"),
    Column("fused_ms", "fused ms", "{:.3f}"),
    Column("layer_e4m3_ms", "fp8 layer ms", "{:.3f}"),
    Column("speedup_e4m3", "speedup", "{:.2f}"),
)


def show_run(console: Console, run: Run) -> None:
    """Print the rows, their geometric means, where sparse layers begin to pay, and the limits."""
    rows = [{key: None if value != value else value for key, value in asdict(row).items()} for row in run.rows]  # NaN is absent
    console.print(terminal_table(COLUMNS, rows))
    speedup, tflops = geometric_mean(row.speedup for row in run.rows), geometric_mean(row.gemm_tflops for row in run.rows)
    console.print(f"geometric mean: speedup {speedup:.3f}, GEMM {tflops:.0f} TFLOP/s")
    for (n, k), m in break_even(run.rows).items():
        console.print(f"N {n}, K {k}: " + ("slower than dense at every M" if m is None else f"not slower than dense from M = {m} on"))
    console.print("\n".join(run.notes), soft_wrap=True)


TUNED_COLUMNS = (
    *(Column(key, key.upper()) for key in ("m", "n", "k")),
    Column("rank", "rank"),
    Column("planned", "planned", numeric=False),
    Column("planned_ms", "ms", "{:.3f}"),
    Column("kernel", "runs now", numeric=False),
    Column("kernel_ms", "ms", "{:.3f}"),
    Column("gain", "gain", "{:.3f}"),
)


def tuned_table(tuned: Sequence[Tuned]) -> Table:
    """What `rtlynx.autotune` found; without times where it was known from before."""
    rows = [
        {
            **asdict(one.problem),
            "planned": one.planned,
            "planned_ms": one.milliseconds.get(one.planned),
            "kernel": one.kernel,
            "kernel_ms": one.milliseconds.get(one.kernel),
            "gain": one.gain if one.milliseconds else None,
        }
        for one in tuned
    ]
    return terminal_table(TUNED_COLUMNS, rows)
