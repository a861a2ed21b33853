"""``rtlynx bench quality``: every method on a trained model of the demo's world; rows go to quality.csv."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def quality(
    model: Annotated[
        str, typer.Option(help="`small`, the one that ships with the package, or a pipeline folder from rtlynx.demo.train.")
    ] = "small",
    out: Annotated[Path, typer.Option(help="Folder for the results; one per device is made in it.", file_okay=False)] = Path(
        "benches/results"
    ),
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")] = "auto",
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to sample.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 28,
    batch: Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")] = 256,
    calibration_prompts: Annotated[int, typer.Option(min=1, help="Other prompts, to fit on.")] = 64,
    rank: Annotated[int, typer.Option(min=1, max=128, help="Rank at which all methods are compared.")] = 16,
    ranks: Annotated[str, typer.Option(help="Further ranks, separated by commas.")] = "8,32,64",
    only: Annotated[str, typer.Option(help="Measure only rows of these methods, separated by commas; `split/shift/16`: one row.")] = "",
    recipe: Annotated[
        list[Path] | None, typer.Option(help="A file of `rtlynx search`, measured as a row of that name; can be given again.", exists=True)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, noise and calibration.")] = 0,
    training_steps: Annotated[int, typer.Option(min=1, help="Of the paper's trained branch; its rows take most of the time.")] = 2000,
    part: Annotated[
        str, typer.Option(help="`1/2` and `2/2`: two processes, each on a GPU of its own and into one folder, share the rows.")
    ] = "1/1",
    commit: Annotated[str | None, typer.Option(help="The commit to name in the files, where git cannot tell.")] = None,
) -> None:
    """Measure every method of compensation on a trained model: velocities, pictures, layers. An interrupted run goes on."""
    # Before torch loads its thread pool: threads that wait by spinning make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rich.console import Console

    from rtlynx.bench.quality.main import Wanted, run_quality
    from rtlynx.bench.quality.run import Settings

    settings = Settings(
        prompts=prompts,
        steps=steps,
        batch=min(batch, prompts),
        calibration_prompts=calibration_prompts,
        seed=seed,
        training_steps=training_steps,
    )
    names = frozenset(filter(None, only.split(",")))
    wanted = Wanted(model, device, rank, tuple(int(each) for each in ranks.split(",") if each), names, tuple(recipe or ()), _part(part))
    files = run_quality(wanted, settings, out, commit)
    Console(highlight=False).print("\n".join(f"wrote {path}" for path in files))


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise typer.BadParameter(f"{text!r} is not a part such as 1/2", param_hint="--part")
    return int(number), int(count)


def quality_docs(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of result files, one per device, e.g. benches/results/nvidia-h200.", exists=True, file_okay=False),
    ],
    page: Annotated[Path, typer.Option(help="The page to put the tables into.", exists=True, dir_okay=False)] = Path("docs/quality.md"),
) -> None:
    """Put the results of `rtlynx bench quality` into the documentation; needs no GPU."""
    from rtlynx.bench.quality.docs import write_docs

    for path in write_docs(results, page):
        typer.echo(f"wrote {path}")
