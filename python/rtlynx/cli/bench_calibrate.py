"""``rtlynx bench calibrate``: time the calibration of a full-size model on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtlynx.cli.gpu import FullSizeModel, require_gpu
from rtlynx.errors import InvalidArgumentError


def calibrate(
    name: FullSizeModel,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Draw the weights: nothing is downloaded.")] = False,
    method: Annotated[list[str] | None, typer.Option(help="As of `rtlynx calibrate`. Can be given again. Default: split.")] = None,
    rank: Annotated[int, typer.Option(min=16, max=128, help="Rank of the branch.")] = 64,
    selection: Annotated[str, typer.Option(help="Options of the selection, separated by commas: shift, permutation.")] = "shift",
    prompts: Annotated[int, typer.Option(min=1, help="Samples that the dense model runs on.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Forwards of each.")] = 8,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB for samples; default: half of what is free.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file, e.g. benches/results.", file_okay=False)] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to name in the file, where git cannot tell.")] = None,
) -> None:
    """Time the calibration of a whole model: the dense runs, and solving for all layers, each method by itself."""
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from rtlynx.bench.calibration import CalibrationTimes, measure_calibration
    from rtlynx.bench.machine import describe, gpu_slug
    from rtlynx.bench.models import MODELS
    from rtlynx.bench.results import write_csv
    from rtlynx.calibrate import METHODS
    from rtlynx.calibrate.selection import OPTIONS
    from rtlynx.report.table import Column, terminal_table

    methods = method or ["split"]
    if name not in MODELS:
        raise InvalidArgumentError("bench calibrate", "--model", repr(name), ", ".join(MODELS))
    if not random_weights:
        raise InvalidArgumentError("bench calibrate", "--random-weights", "not given", "it: released weights are not read yet")
    if unknown := set(methods) - set(METHODS):
        raise InvalidArgumentError("bench calibrate", "--method", ", ".join(sorted(unknown)), ", ".join(METHODS))
    options = tuple(option for option in selection.split(",") if option)
    if unknown := set(options) - set(OPTIONS):
        raise InvalidArgumentError("bench calibrate", "--selection", ", ".join(sorted(unknown)), ", ".join(OPTIONS))
    require_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    given = " ".join(f"--method {each}" for each in methods)
    command = f"rtlynx bench calibrate --model {name} --random-weights {given} --rank {rank}"
    command += f" --selection {','.join(options) or repr('')} --prompts {prompts} --steps {steps}"
    command += "" if memory is None else f" --memory {memory:g}"
    samples = None if memory is None else int(memory * 2**30)
    # Before anything is written: git may track the file, and would then call the commit one with changes.
    header = describe(command, commit, "one run of each, random weights and inputs")
    path = None if out is None else out / gpu_slug() / "calibration.csv"
    rows: list[CalibrationTimes] = []
    for each in methods:
        rows.append(
            measure_calibration(
                MODELS[name], device, method=each, selection=options, rank=rank, prompts=prompts, steps=steps, memory=samples
            )
        )
        if path is not None:  # after each: a method takes minutes, and what has been measured outlives an interruption
            write_csv(path, header, rows, CalibrationTimes)
    columns = [Column(key, key) for key in ("method", "selection", "rank", "layers", "prompts", "steps", "passes")]
    columns += [Column(key, key.replace("_", " "), "{:.1f}") for key in ("total_s", "model_s", "solving_s", "peak_gb")]
    console = Console(highlight=False)
    console.print(terminal_table(columns, [asdict(row) for row in rows], title=f"{name}, random weights"))
    if path is not None:
        console.print(f"wrote {path}")
