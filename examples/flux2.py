"""FLUX.2-dev: two very wide layers in each of its single-stream blocks."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import Flux2Pipeline


def main() -> None:
    options = parse(__doc__, "black-forest-labs/FLUX.2-dev", steps=28, out="flux2.png")
    pipe = Flux2Pipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options)
    save_image(sample(pipe, options, height=1024, width=1024, guidance_scale=4.0), options)


if __name__ == "__main__":
    main()
