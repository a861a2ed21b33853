"""The problems every GPU test runs, listed once. (M, N, K): tokens, output channels, input channels."""

from __future__ import annotations

import pytest
import torch

MODEL_SHAPES = [
    (4096, 3072, 3072),  # FLUX, Qwen-Image: attention of the image stream
    (512, 3072, 3072),  # FLUX: attention of the text stream
    (4096, 12288, 3072),  # FLUX, Qwen-Image: MLP up
    (4608, 3072, 12288),  # FLUX: MLP down
    (4608, 3072, 15360),  # FLUX: proj_out of a single-stream block
    (6889, 3072, 3072),  # Qwen-Image at 1328²
    (77, 12288, 3072),  # Qwen-Image: a short prompt
    (4224, 3840, 3840),  # Z-Image: attention
    (4224, 10240, 3840),  # Z-Image: w1, w3
    (4224, 3840, 10240),  # Z-Image: w2
    (4250, 2432, 2432),  # SD3.5 Large: K = 38 · 64
    (4096, 1152, 4608),  # PixArt-Σ
    (2048, 5120, 13824),  # Wan 2.1 14B: MLP down
    (1024, 6144, 24576),  # FLUX.2: attn.to_out
]
"""Layers of real models, with the token counts they see."""

TAIL_SHAPES = [
    (1, 8, 64),
    (3, 24, 128),
    (15, 64, 192),
    (16, 72, 256),
    (33, 136, 320),
    (63, 128, 448),
    (64, 128, 512),
    (65, 120, 576),
    (127, 256, 640),
    (129, 264, 1152),
    (200, 8, 64),
]
"""Small problems that leave every tile, block, pipeline stage and word partly filled."""

RANKS = [0, 16, 32, 48, 64, 80, 128]

OPERANDS = [pytest.param(None, id="16-bit"), pytest.param(torch.float8_e4m3fn, id="e4m3")]
"""Values of `values_dtype`; conftest skips e4m3 where there are no kernels for it."""
