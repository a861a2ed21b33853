"""Stable Diffusion 3.5 large."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import StableDiffusion3Pipeline


def main() -> None:
    options = parse(__doc__, "stabilityai/stable-diffusion-3.5-large", steps=28, out="sd3.png")
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options)
    save_image(sample(pipe, options, height=1024, width=1024, guidance_scale=3.5), options)


if __name__ == "__main__":
    main()
