"""``rtlynx bench model``: time one denoising step of a full-size model on this machine's GPU."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rtlynx.cli.gpu import FullSizeModel, require_gpu
from rtlynx.errors import InvalidArgumentError


def model(
    name: FullSizeModel,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw the weights: nothing is downloaded.")] = False,
    height: Annotated[int | None, typer.Option(min=64, help="Of the picture in pixels; default: the model's usual one.")] = None,
    width: Annotated[int | None, typer.Option(min=64, help="Of the picture in pixels; default: the model's usual one.")] = None,
    rank: Annotated[int, typer.Option(min=16, max=128, help="Rank of the branch in the compensated modes.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of every mode.")] = 10,
    eager: Annotated[bool, typer.Option(help="Time the modes without torch.compile.")] = True,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time the modes with compiled blocks.")] = True,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            help="naive, compensated, 'sparse fp8', fp8 (these by default); 'sparse fp8 compact', 'sparse fp8 unfused', "
            "'sparse fp8 adaln', fp8-storage, first-block-cache, each also with 'dense ' before it. With ' without CLASS' behind it, "
            "blocks of that class are not fused.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the CSV file and its picture, e.g. benches/results.", file_okay=False)
    ] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time one denoising step: dense, sparse with and without compensation and in fp8, and torchao's fp8 where it is installed."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.models import MODELS
    from rtlynx.bench.step import MODES, USUAL_MODES, WITHOUT, StepTimes, measure_step
    from rtlynx.bench.step_results import save_picture, write_steps
    from rtlynx.report.table import Column, terminal_table

    if name not in MODELS:
        raise InvalidArgumentError("bench model", "--model", repr(name), ", ".join(MODELS))
    if not random_weights:
        raise InvalidArgumentError("bench model", "--random-weights", "not given", "it: released weights are not read yet")
    if not (eager or compiled):
        raise InvalidArgumentError("bench model", "--no-eager --no-compile", "both", "one of them")
    if unknown := {mode.partition(WITHOUT)[0] for mode in modes or ()} - set(MODES):
        raise InvalidArgumentError("bench model", "--mode", ", ".join(sorted(unknown)), ", ".join(MODES))
    require_gpu()
    chosen = MODELS[name]
    size = (height or chosen.size[0], width or chosen.size[1])
    device = torch.device("cuda", torch.cuda.current_device())
    path = None if out is None else out / gpu_slug() / "model.csv"
    given = {"--no-eager": not eager, "--no-compile": not compiled}
    options = [option for option, there in given.items() if there] + [f"--mode {shlex.quote(mode)}" for mode in modes or ()]
    of_size = f"--height {size[0]} --width {size[1]} --rank {rank} --repeats {repeats}"
    command = " ".join((f"rtlynx bench model --model {name} --random-weights {of_size}", *options))
    machine = describe(command, commit, "medians of whole steps, modes in turns, random weights and inputs")

    def save(rows: list[StepTimes], notes: list[str]) -> None:
        if path is not None:
            write_steps(path, [*machine, *notes], rows)

    chosen_modes = tuple(modes or USUAL_MODES)
    rows, notes = measure_step(
        chosen, device, size=size, rank=rank, repeats=repeats, eager=eager, compiled=compiled, modes=chosen_modes, after_row=save
    )
    columns = [
        Column("mode", "mode"),
        Column("compiled", "compiled"),
        *(Column(key, heading, "{:.1f}") for key, heading in (("step_ms", "step ms"), ("gemm_ms", "GEMM ms"))),
        *(Column(f"{key}_ms", f"{key} ms", "{:.1f}") for key in ("attention", "select", "other", "gap", "graph")),
        Column("memory_gb", "memory GB", "{:.1f}"),
        Column("speedup", "speedup", "{:.2f}"),
    ]
    console = Console(highlight=False)
    console.print(f"{chosen.name}, {size[0]} x {size[1]}, random weights")
    console.print(terminal_table(columns, [asdict(row) for row in rows]))
    console.print("\n".join(notes))
    if path is None:
        return
    console.print(f"wrote {path}")
    try:
        console.print(f"wrote {save_picture(path)}")
    except ImportError as error:
        console.print(f"no picture ({error}): pip install 'rtlynx[bench]'")
