"""PixArt-Σ, a small model: on a large GPU its layers are faster dense, and the summary says so."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import PixArtSigmaPipeline


def main() -> None:
    options = parse(__doc__, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", steps=20, out="pixart.png")
    pipe = PixArtSigmaPipeline.from_pretrained(options.model, torch_dtype=torch.float16)
    prepare(pipe, options)
    save_image(sample(pipe, options, height=1024, width=1024, guidance_scale=4.5), options)


if __name__ == "__main__":
    main()
