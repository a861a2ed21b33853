"""What commands that measure a GPU have in common."""

from __future__ import annotations

from typing import Annotated

import typer

FullSizeModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="flux.1-dev, flux.1-schnell, qwen-image, z-image, wan-2.1-14b, sd3.5-large, pixart-sigma; with few of their blocks "
        "flux.2-dev-part, chroma-part, hunyuan-video-part, ltx-video-13b-part.",
    ),
]
"""A name of `rtlynx.bench.models`."""


def require_gpu() -> None:
    """Refuse to measure on a machine without a GPU."""
    import torch

    from rtlynx.errors import DeviceError

    if not torch.cuda.is_available():
        message = "there is no GPU to measure; `rtlynx info` shows what is missing"
        raise DeviceError("bench", "device", "no GPU", "a GPU", message)
