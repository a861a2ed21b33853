"""``rtlynx demo``: images from a sparse diffusion transformer beside the dense ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def demo(
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`. auto takes a GPU if the kernels run there.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for demo.png, demo.html and demo.json.", file_okay=False, writable=True)] = Path(
        "rtlynx-demo"
    ),
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts. Default: 8 on the CPU, 64 on a GPU.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps per image.")] = 16,
    rank: Annotated[int, typer.Option(min=16, max=128, help="Rank of the compensation branch, a multiple of 16.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the prompts, the noise and the calibration.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A pipeline folder instead of the shipped one.", exists=True, file_okay=False)] = None,
) -> None:
    """Sample the shipped text-to-image model dense and with every kind of sparsity, at the same seeds, and compare.

    Writes a picture grid (demo.png), a page that explains it (demo.html) and the numbers (demo.json).
    """
    # Before torch loads its thread pool: threads that wait by spinning make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rich.console import Console

    from rtlynx.demo.run import Settings, run_demo
    from rtlynx.demo.show import print_result, write_result

    try:  # not after minutes of sampling
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot be made: {error}", param_hint="--out") from error
    result = run_demo(Settings(device=device, prompts=prompts, steps=steps, rank=rank, seed=seed, model=model))
    files = write_result(result, out)
    print_result(result, files, Console(highlight=False))
