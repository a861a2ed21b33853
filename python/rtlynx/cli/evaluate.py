"""``rtlynx eval``: a sparse model against the same model dense, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A pipeline: a name on the Hugging Face hub, a folder, or `demo`.")],
    compensation: Annotated[Path | None, typer.Option(help="A file from `rtlynx calibrate`.", exists=True, dir_okay=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.", exists=True, dir_okay=False)] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the prompts to use.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per run.")] = 1,
    fewer_steps: Annotated[int | None, typer.Option(min=0, help="Steps of the dense baseline; default: equal time. 0: none.")] = None,
    noise_floor: Annotated[bool, typer.Option(help="Also sample the dense model in another precision; takes a copy of it.")] = True,
    metrics: Annotated[
        str, typer.Option(help="Further metrics whose weights you have, separated by commas: lpips, clip, fid, image_reward.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for the report.", file_okay=False)] = Path("rtlynx-eval"),
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 1,
) -> None:
    """Sample the same prompts from the same noise dense and sparse, and say what changed."""
    from rich.console import Console

    import rtlynx
    from rtlynx.cli.pipelines import load_pipeline, read_prompts
    from rtlynx.evaluate import evaluate as compare
    from rtlynx.evaluate import write_report
    from rtlynx.evaluate.report import columns, table_rows
    from rtlynx.report import terminal_table

    texts = read_prompts(prompts, model, count, seed)
    pipe = load_pipeline(model, device, dtype)
    if compensation is None:
        rtlynx.apply(pipe)
    else:
        rtlynx.load_compensation(pipe, compensation)
    result = compare(
        pipe,
        texts,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        noise_floor=noise_floor,
        fewer_steps=fewer_steps,
        metrics=[name for name in metrics.split(",") if name],
    )
    settings = {"model": f"`{model}`", "compensation": f"`{compensation}`" if compensation else "none", "seed": str(seed)}
    files = write_report(result, out, settings)
    console = Console(highlight=False)
    console.print(terminal_table(columns(result), table_rows(result)))
    console.print("\n".join(f"wrote {file}" for file in files))
