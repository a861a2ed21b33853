"""FLUX.1-dev."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import FluxPipeline


def main() -> None:
    options = parse(__doc__, "black-forest-labs/FLUX.1-dev", steps=28, out="flux.png")
    pipe = FluxPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options)
    save_image(sample(pipe, options, height=1024, width=1024, guidance_scale=3.5), options)


if __name__ == "__main__":
    main()
