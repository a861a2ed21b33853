"""LTX-Video."""

from __future__ import annotations

import torch
from common import parse, prepare, sample, save_video
from diffusers import LTXPipeline


def main() -> None:
    options = parse(__doc__, "Lightricks/LTX-Video", steps=50, out="ltx.mp4")
    pipe = LTXPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16)
    prepare(pipe, options, height=480, width=704, num_frames=33)
    save_video(sample(pipe, options, height=480, width=704, num_frames=161), options, fps=24)


if __name__ == "__main__":
    main()
