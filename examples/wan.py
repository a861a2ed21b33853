"""Wan 2.2 14B: two transformers, for high and for low noise, and both become sparse."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_video
from diffusers import WanPipeline


def main() -> None:
    options = parse(__doc__, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", steps=40, out="wan.mp4")
    pipe = WanPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options, height=480, width=832, num_frames=33)
    save_video(sample(pipe, options, height=480, width=832, num_frames=81, guidance_scale=4.0), options, fps=16)


if __name__ == "__main__":
    main()
