"""``rtlynx bench``: measure the kernels on this machine's GPU."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from rtlynx.cli.bench_calibrate import calibrate
from rtlynx.cli.bench_model import model
from rtlynx.cli.bench_norm_rotary import norm_rotary
from rtlynx.cli.gpu import require_gpu

app = typer.Typer(help="Measure the kernels on this machine's GPU.", no_args_is_help=True)
app.command("model")(model)
app.command("calibrate")(calibrate)
app.command("norm-rotary")(norm_rotary)


class ShapeSet(str, Enum):
    """Sets of `rtlynx.bench.shapes`."""

    dit = "dit"
    small = "small"
    narrow = "narrow"
    odd = "odd"


Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of everything.")]


@app.command("gemm")
def gemm(
    shapes: Annotated[
        list[ShapeSet], typer.Option(help="Which layers: large, with few tokens, of few outputs, with odd sizes. Can be given again.")
    ] = [ShapeSet.dit],  # noqa: B006 - typer reads it and nothing changes it
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Repeats = 30,
    peers: Annotated[bool, typer.Option(help="Also time what else computes such a layer.")] = True,
    portable: Annotated[bool, typer.Option("--portable", help="Time the kernels that every GPU from sm_80 on can run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV files and pictures, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the files, where git cannot tell.")] = None,
) -> None:
    """Time the sparse layer, whole and in parts, against cuBLAS and other peers, and the limits of this GPU in the same run."""
    from rich.console import Console

    require_gpu()
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.plot import plots
    from rtlynx.bench.results import write_csv
    from rtlynx.bench.run import kernels_of_every_gpu, run_layers
    from rtlynx.bench.shapes import SHAPES
    from rtlynx.bench.show import show_run

    console = Console(highlight=False)
    for shape_set in shapes:
        with kernels_of_every_gpu() if portable else nullcontext():
            run = run_layers(SHAPES[shape_set.value], rank, repeats, peers)
        show_run(console, run)
        if out is None:
            continue
        name = "_".join(["layer", *([] if shape_set is ShapeSet.dit else [shape_set.value]), *(["portable"] if portable else [])])
        path = out / gpu_slug() / f"{name}.csv"
        options = ("" if peers else " --no-peers") + (" --portable" if portable else "")
        command = f"rtlynx bench gemm --shapes {shape_set.value} --rank {rank} --repeats {repeats}{options}"
        write_csv(path, [*describe(command, commit), *run.notes], run.rows)
        console.print(f"wrote {path}")
        try:
            console.print("\n".join(f"wrote {picture}" for picture in plots(path)))
        except ImportError as error:
            console.print(f"no pictures ({error}): pip install 'rtlynx[bench]', then `rtlynx bench plot {path}`")


class Dtype(str, Enum):
    """Element types that the kernels serve, by torch's names."""

    bfloat16 = "bfloat16"
    float16 = "float16"


class Operands(str, Enum):
    """Values of `SparsityConfig.precision`."""

    model = "model"
    fp8 = "fp8"


@app.command("tune")
def tune(
    shapes: Annotated[list[ShapeSet], typer.Option(help="Which layers, as for `gemm`. Can be given again.")] = [ShapeSet.dit],  # noqa: B006
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="Element type.")] = Dtype.bfloat16,
    precision: Annotated[Operands, typer.Option(help="Of the sparse product's operands: the element type, or fp8.")] = Operands.model,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    repeats: Repeats = 30,
) -> None:
    """Measure which GEMM kernel is fastest for each layer, and remember it for all later runs: what `rtlynx.autotune` does for a model."""
    from rich.console import Console

    require_gpu()
    import torch

    from rtlynx.autotune import autotune
    from rtlynx.bench.shapes import SHAPES
    from rtlynx.bench.show import tuned_table

    problems = [(m, n, k, rank) for shape_set in shapes for m, n, k in SHAPES[shape_set.value]]
    tuned = autotune(problems, dtype=getattr(torch, dtype.value), precision=precision.value, again=again, repeats=repeats)
    Console(highlight=False).print(tuned_table(tuned))


@app.command("peak")
def peak(repeats: Repeats = 30) -> None:
    """Measure what this GPU gives at most: tensor cores with operands in place, the GEMM's main loop, a copy."""
    from rich.console import Console

    require_gpu()
    from rtlynx.bench.probe import measure_limits

    Console(highlight=False).print("\n".join(measure_limits(repeats).header()))


@app.command("energy")
def energy(
    shapes: Annotated[list[ShapeSet], typer.Option(help="Which layers, as for `gemm`. Can be given again.")] = [ShapeSet.dit],  # noqa: B006
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each product runs after it has settled.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Run each product of a layer without a pause: its time, the board's power and clock, and the energy of a call. Needs nvidia-ml-py."""
    from dataclasses import asdict

    from rich.console import Console

    require_gpu()
    from rtlynx.bench.energy import Energy, measure_energy, measure_limits_energy
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.results import write_csv
    from rtlynx.bench.shapes import SHAPES
    from rtlynx.report.table import Column, terminal_table

    layers = [layer for shape_set in shapes for layer in SHAPES[shape_set.value]]
    rows = [row for m, n, k in layers for row in measure_energy(m, n, k, rank, seconds)] + measure_limits_energy(seconds)
    columns = [Column(key, key) for key in ("m", "n", "k", "what")]
    columns += [Column(key, key, form) for key, form in (("ms", "{:.4f}"), ("tflops", "{:.0f}"), ("watts", "{:.0f}"), ("mhz", "{:.0f}"))]
    console = Console(highlight=False)
    console.print(terminal_table([*columns, Column("millijoules", "mJ", "{:.1f}")], [asdict(row) for row in rows]))
    if out is None:
        return
    path = out / gpu_slug() / "energy.csv"
    command = f"rtlynx bench energy {' '.join(f'--shapes {s.value}' for s in shapes)} --rank {rank} --seconds {seconds:g}"
    write_csv(path, describe(command, commit, "each call alone, repeated without a pause; medians of power and clock"), rows, Energy)
    console.print(f"wrote {path}")


@app.command("tiles")
def tiles(
    shapes: Annotated[list[ShapeSet], typer.Option(help="Which layers, as for `gemm`. Can be given again.")] = [  # noqa: B006
        ShapeSet.dit,
        ShapeSet.odd,
        ShapeSet.small,
    ],
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Repeats = 11,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time every GEMM kernel on the same products: what the tile table would say of this GPU, and how good its choice is."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    require_gpu()
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.results import write_csv
    from rtlynx.bench.shapes import SHAPES
    from rtlynx.bench.tiles import KernelTime, fit_tiles, kernel_times, plan_losses
    from rtlynx.report.table import Column, terminal_table

    layers = list(dict.fromkeys(layer for shape_set in shapes for layer in SHAPES[shape_set.value]))
    rows = kernel_times(layers, rank, repeats)
    columns = [Column("tile", "tile", numeric=False), *(Column(key, key, "{:.0f}") for key in ("step_ns", "e4m3_step_ns", "tile_ns"))]
    fitted = fit_tiles(rows, torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(one) for one in fitted]))
    losses = plan_losses(rows)
    worst = max(losses, key=losses.__getitem__)
    mean = sum(losses.values()) / len(losses)
    console.print(f"the planned kernel takes {mean:.2%} longer than the fastest on average, at most {losses[worst]:.1%}: {worst}")
    if out is None:
        return
    path = out / gpu_slug() / "tiles.csv"
    command = f"rtlynx bench tiles {' '.join(f'--shapes {s.value}' for s in shapes)} --rank {rank} --repeats {repeats}"
    header = describe(command, commit, "medians of CUDA-event times in ms, cold L2, random data, kernels interleaved")
    write_csv(path, header, rows, KernelTime)
    console.print(f"wrote {path}")


@app.command("profile")
def profile(
    layers: Annotated[list[str], typer.Option("--layer", help="MxNxK; can be given again.")] = [  # noqa: B006
        "4096x3072x3072",
        "4608x12288x3072",
        "4608x3072x12288",
        "4224x3840x3840",
        "6889x3072x3072",
        "8192x8192x12288",
    ],
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    ncu: Annotated[str | None, typer.Option(help="The program, where it is not on PATH.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """How far the kernels of a layer, and CUTLASS's, fill every unit of the GPU. Needs Nsight Compute, and leave to read its counters."""
    from rich.console import Console

    require_gpu()
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.profile import Utilisation, fullest, profile
    from rtlynx.bench.results import write_csv
    from rtlynx.report.table import Column, terminal_table

    shapes = [parsed_layer(layer) for layer in layers]
    try:
        rows = profile(shapes, rank, ncu)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--ncu") from error
    console = Console(highlight=False)
    columns = [Column(key, key) for key in ("m", "n", "k", "what")]
    columns += [Column("metric", "metric", numeric=False), Column("value", "%", "{:.0f}")]
    console.print(terminal_table(columns, fullest(rows)))
    if out is None:
        return
    path = out / gpu_slug() / "profile.csv"
    command = f"rtlynx bench profile {' '.join(f'--layer {layer}' for layer in layers)} --rank {rank}"
    write_csv(path, describe(command, commit, "counters of ncu, a cold L2 before every pass, clocks left alone"), rows, Utilisation)
    console.print(f"wrote {path}")


def parsed_layer(text: str) -> tuple[int, int, int]:
    """M, N and K of ``MxNxK``."""
    try:
        m, n, k = map(int, text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected MxNxK, e.g. 4608x12288x3072", param_hint="--layer") from None
    return m, n, k


@app.command("activation")
def activation(
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Repeats = 30,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time selection with the activation, the norm or the permutation before it in its kernel, and with a pass of its own before it."""
    from dataclasses import asdict

    from rich.console import Console

    require_gpu()
    from rtlynx.bench.activation import BEFORE, NORMS, ActivationTimes, measure_activation, measure_norm
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.results import write_csv
    from rtlynx.report.table import Column, terminal_table

    rows = [row for before in BEFORE for row in measure_activation(before, rank, repeats)]
    rows += [row for norm in NORMS for row in measure_norm(norm, rank, repeats)]
    columns = [Column(key, key) for key in ("m", "k", "head_k", "activation", "gathered", "values")]
    columns += [Column(f"{key}_ms", f"{key} ms", "{:.4f}") for key in ("select", "fused", "eager", "compiled", "copy")]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    if out is None:
        return
    path = out / gpu_slug() / "activation.csv"
    write_csv(path, describe(f"rtlynx bench activation --rank {rank} --repeats {repeats}", commit), rows, ActivationTimes)
    console.print(f"wrote {path}")


@app.command("epilogue")
def epilogue(
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Repeats = 30,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time a product with what follows it in its kernel, and with passes of their own behind it."""
    from dataclasses import asdict

    from rich.console import Console

    require_gpu()
    from rtlynx.bench.epilogue import AFTER, EpilogueTimes, measure_epilogue
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.results import write_csv
    from rtlynx.report.table import Column, terminal_table

    rows = [row for after in AFTER for row in measure_epilogue(after, rank, repeats)]
    columns = [Column(key, key) for key in ("m", "n", "k", "after", "operands")]
    columns += [Column(f"{key}_ms", f"{key} ms", "{:.4f}") for key in ("product", "fused", "eager", "compiled")]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    if out is None:
        return
    path = out / gpu_slug() / "epilogue.csv"
    write_csv(path, describe(f"rtlynx bench epilogue --rank {rank} --repeats {repeats}", commit), rows, EpilogueTimes)
    console.print(f"wrote {path}")


@app.command("host")
def host(
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch.")] = 64,
    repeats: Repeats = 30,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Measure what a call of a layer costs the host: eager, whole and in parts, and compiled."""
    from dataclasses import asdict

    from rich.console import Console

    require_gpu()
    from rtlynx.bench.host import METHOD, HostTime, host_times
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.results import write_csv
    from rtlynx.report.table import Column, terminal_table

    rows = host_times(rank, repeats)
    columns = [Column("call", "call", numeric=False), Column("part", "part", numeric=False), Column("us", "us", "{:.2f}")]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    if out is None:
        return
    path = out / gpu_slug() / "host.csv"
    write_csv(path, describe(f"rtlynx bench host --rank {rank} --repeats {repeats}", commit, METHOD), rows, HostTime)
    console.print(f"wrote {path}")


@app.command("plot")
def plot(results: Annotated[list[Path], typer.Argument(help="CSV files of `rtlynx bench gemm`.", exists=True, dir_okay=False)]) -> None:
    """Draw result files again; needs no GPU."""
    from rtlynx.bench.plot import plots

    for path in results:
        for picture in plots(path):
            typer.echo(f"wrote {picture}")
