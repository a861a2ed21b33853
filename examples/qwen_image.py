"""Qwen-Image; with a guidance scale above 1 every step is two forwards."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_image
from diffusers import QwenImagePipeline


def main() -> None:
    options = parse(__doc__, "Qwen/Qwen-Image", steps=50, out="qwen_image.png")
    pipe = QwenImagePipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options, negative_prompt=" ", true_cfg_scale=4.0)
    save_image(sample(pipe, options, height=1024, width=1024, negative_prompt=" ", true_cfg_scale=4.0), options)


if __name__ == "__main__":
    main()
