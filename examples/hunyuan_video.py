"""HunyuanVideo."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_video
from diffusers import HunyuanVideoPipeline


def main() -> None:
    options = parse(__doc__, "hunyuanvideo-community/HunyuanVideo", steps=30, out="hunyuan_video.mp4")
    pipe = HunyuanVideoPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options, height=320, width=512, num_frames=33)
    save_video(sample(pipe, options, height=320, width=512, num_frames=61), options, fps=15)


if __name__ == "__main__":
    main()
