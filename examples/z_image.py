"""Z-Image-Turbo: distilled to a few steps, without guidance."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import ZImagePipeline


def main() -> None:
    options = parse(__doc__, "Tongyi-MAI/Z-Image-Turbo", steps=9, out="z_image.png")
    pipe = ZImagePipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options, guidance_scale=0.0)
    save_image(sample(pipe, options, height=1024, width=1024, guidance_scale=0.0), options)


if __name__ == "__main__":
    main()
