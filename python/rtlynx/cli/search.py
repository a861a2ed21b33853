"""``rtlynx search``: which layers of a model to make sparse, and with which rank, for a budget of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def search(
    model: Annotated[str, typer.Argument(help="A pipeline: a name on the Hugging Face hub, a folder, or `demo`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe file to write; a picture goes beside it.", dir_okay=False)],
    budget: Annotated[str, typer.Option(help="Time of the layers as a share of the dense layers', or `paper`.")] = "0.85",
    compensation: Annotated[Path | None, typer.Option(help="Also save what was fitted, for `rtlynx eval`.", dir_okay=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.", exists=True, dir_okay=False)] = None,
    count: Annotated[int, typer.Option(min=2, help="How many of the prompts to use; a quarter of them to judge by.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the dense runs.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per run.")] = 1,
    ranks: Annotated[str, typer.Option(help="Ranks to choose from, separated by commas; 0: no branch.")] = "0,32,64,128",
    method: Annotated[str, typer.Option(help="As in `rtlynx calibrate`, one with a branch.")] = "split",
    selection: Annotated[str, typer.Option(help="Options of the selection, separated by commas: shift, permutation.")] = "shift",
    precision: Annotated[str, typer.Option(help="Operands of the sparse products: `model` or `fp8`.")] = "model",
    adaln_shift: Annotated[bool, typer.Option(help="Select without the shift of adaLN; its own passes are not timed.")] = False,
    times: Annotated[
        str | None, typer.Option(help="layer.csv of `rtlynx bench gemm`, instead of measuring here; `work`: count the work instead.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB for samples; default: half of what is free.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Random probes of every held-out call.")] = 1,
    refine: Annotated[int, typer.Option(min=0, help="Exchanges to measure.")] = 8,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of noise, samples and probes.")] = 0,
) -> None:
    """Find the recipe with the least error within a budget of time: which layers stay dense, which rank the others get."""
    from rich.console import Console

    import rtlynx
    from rtlynx.cli.pipelines import load_pipeline, read_prompts
    from rtlynx.report import Column, terminal_table
    from rtlynx.search import plot_pareto

    texts = read_prompts(prompts, model, count, seed)
    pipe = load_pipeline(model, device, dtype)
    found = rtlynx.search(
        pipe,
        texts,
        config=rtlynx.SparsityConfig(precision=precision, adaln_shift=adaln_shift),  # type: ignore[arg-type]  # which checks it
        budget="paper" if budget == "paper" else _share(budget),
        ranks=[int(rank) for rank in ranks.split(",") if rank.strip().isdigit()],
        method=method,
        selection=tuple(option for option in selection.split(",") if option),
        times=times,
        output=output,
        probes=probes,
        refine=refine,
        memory=None if memory is None else int(memory * 2**30),
        seed=seed,
        batch_size=batch_size,
        num_inference_steps=steps,
    )
    console = Console(highlight=False)
    columns = [
        Column("name", "layers"),
        Column("time", "time", "{:.4g}", numeric=True),
        Column("share", "of dense", "{:.1%}", numeric=True),
        Column("predicted", "predicted error", "{:.2%}", numeric=True),
        Column("measured", "measured error", "{:.2%}", numeric=True),
    ]
    rows = [{key: getattr(point, key) for key in ("name", "time", "share", "predicted", "measured")} for point in found.points]
    console.print(terminal_table(columns, rows, title=f"times {found.times_from}"))
    console.print(f"wrote {output}")
    if compensation is not None:
        found.compensation.save(compensation)
        console.print(f"wrote {compensation}")
    try:
        plot_pareto(found.points, output.with_suffix(".svg"), model)
        console.print(f"wrote {output.with_suffix('.svg')}")
    except ImportError as error:
        console.print(f"no picture ({error}): pip install 'rtlynx[search]'")


def _share(budget: str) -> float:
    try:
        return float(budget)
    except ValueError as error:
        raise typer.BadParameter(f"{budget!r} is neither `paper` nor a number", param_hint="--budget") from error
