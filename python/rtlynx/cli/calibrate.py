"""``rtlynx calibrate``: from a model and prompts to a compensation file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="A pipeline: a name on the Hugging Face hub, a folder, or `demo`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The compensation file to write.", dir_okay=False)],
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.", exists=True, dir_okay=False)] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the prompts to use.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the dense runs.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per run.")] = 1,
    method: Annotated[str, typer.Option(help="split, paper, refit, joint, paper-trained or plain (docs/guides/calibration.md).")] = "split",
    rank: Annotated[int, typer.Option(min=0, max=128, help="Rank of the branch, a multiple of 16.")] = 64,
    selection: Annotated[str, typer.Option(help="Options of the selection, separated by commas: shift, permutation.")] = "shift",
    bias: Annotated[int, typer.Option(min=0, help="Also fit a bias: 1 for all steps, 4 for every quarter of the way to the picture.")] = 0,
    score: Annotated[
        str, typer.Option(help="What selection compares: `magnitude`, or `weight`, by the norm of the weight's column.")
    ] = "magnitude",
    adaln_shift: Annotated[bool, typer.Option(help="Select without the shift of adaLN, and add what it would have given.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave dense; can be given again.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB for samples; default: half of what is free.")] = None,
    samples_on_cpu: Annotated[bool, typer.Option(help="Keep samples in the machine's memory instead of the GPU's.")] = False,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise and of the sampled tokens.")] = 0,
) -> None:
    """Fit the compensation of a model to its own activations. An interrupted run goes on when it is started again.

    On several GPUs: accelerate launch -m rtlynx.cli calibrate ...
    """
    import rtlynx
    from rtlynx.calibrate.processes import Processes
    from rtlynx.cli.pipelines import load_pipeline, read_prompts

    processes = Processes.present()  # before the model is loaded: each has a GPU of its own
    texts = read_prompts(prompts, model, count, seed)
    pipe = load_pipeline(model, device, dtype)
    config = rtlynx.SparsityConfig(rank=rank, selection=score, adaln_shift=adaln_shift, skip=tuple(skip or ()))  # type: ignore[arg-type]  # which checks it
    rtlynx.apply(pipe, config)
    compensation = rtlynx.calibrate(
        pipe,
        texts,
        method=method,
        rank=rank,
        selection=tuple(option for option in selection.split(",") if option),
        bias=bias,
        output=output,
        seed=seed,
        batch_size=batch_size,
        memory=None if memory is None else int(memory * 2**30),
        samples_device="cpu" if samples_on_cpu else None,
        num_inference_steps=steps,
    )
    if processes.main:
        typer.echo(f"wrote {output}: {compensation.method} for {len(compensation.layers)} layers")
