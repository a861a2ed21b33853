"""``rtlynx bench``: measure the kernels on this machine's GPU."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure the kernels on this machine's GPU.", no_args_is_help=True)


class ShapeSet(str, Enum):
    """Sets of `rtlynx.bench.shapes`."""

    dit = "dit"
    small = "small"
    odd = "odd"


@app.callback()
def bench() -> None:
    """Measure the kernels on this machine's GPU."""  # a group even while it has one command


@app.command("gemm")
def gemm(
    shapes: Annotated[
        ShapeSet, typer.Option(help="Which layers: of diffusion transformers, with few tokens, or with odd sizes.")
    ] = ShapeSet.dit,
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of everything.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time the sparse layer, whole and in parts, against cuBLAS in bfloat16 and fp8."""
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from tqdm import tqdm

    from rtlynx.bench.layer import geometric_mean, measure_layer, write_csv
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.shapes import SHAPES
    from rtlynx.errors import DeviceError
    from rtlynx.report.table import Column, terminal_table

    if not torch.cuda.is_available():
        raise DeviceError("bench: there is no GPU to measure; `rtlynx info` shows what is missing")
    layers = SHAPES[shapes.value]
    with tqdm(layers, desc="layers", unit="layer") as progress:
        rows = [measure_layer(m, n, k, rank, repeats) for m, n, k in progress]
    columns = [
        *(Column(key, key.upper()) for key in ("m", "n", "k")),
        Column("dense_ms", "cuBLAS ms", "{:.3f}"),
        Column("fp8_ms", "fp8 ms", "{:.3f}"),
        Column("gemm_ms", "GEMM ms", "{:.3f}"),
        Column("gemm_tflops", "TFLOP/s", "{:.0f}"),
        Column("select_ms", "select ms", "{:.3f}"),
        Column("copy_ms", "copy ms", "{:.3f}"),
        Column("layer_ms", "layer ms", "{:.3f}"),
        Column("speedup", "speedup", "{:.2f}"),
    ]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    speedup, tflops = geometric_mean(row.speedup for row in rows), geometric_mean(row.gemm_tflops for row in rows)
    console.print(f"geometric mean: speedup {speedup:.3f}, GEMM {tflops:.0f} TFLOP/s")
    if out is not None:
        name = "layer.csv" if shapes is ShapeSet.dit else f"layer_{shapes.value}.csv"
        path = out / gpu_slug() / name
        write_csv(path, describe(f"rtlynx bench gemm --shapes {shapes.value} --rank {rank} --repeats {repeats}", commit), rows)
        console.print(f"wrote {path}")
