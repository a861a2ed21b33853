"""``rtlynx bench norm-rotary``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtlynx.cli.gpu import require_gpu


def norm_rotary(
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of everything.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time norm, concatenation and rotary embedding of queries in one kernel, in a few passes, and compiled."""
    from dataclasses import asdict

    from rich.console import Console

    require_gpu()
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.norm_rotary import HEADS, NormRotaryTimes, measure_norm_rotary
    from rtlynx.bench.results import write_csv
    from rtlynx.report.table import Column, terminal_table

    rows = [measure_norm_rotary(heads, repeats) for heads in HEADS]
    columns = [Column(key, key) for key in ("samples", "tokens", "first_tokens", "heads", "dim", "of")]
    columns += [Column(f"{key}_ms", f"{key} ms", "{:.4f}") for key in ("op", "passes", "compiled", "copy")]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    if out is None:
        return
    path = out / gpu_slug() / "norm_rotary.csv"
    write_csv(path, describe(f"rtlynx bench norm-rotary --repeats {repeats}", commit), rows, NormRotaryTimes)
    console.print(f"wrote {path}")
