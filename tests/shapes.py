"""The problems every GPU test runs, listed once. (M, N, K): tokens, output channels, input channels."""

from __future__ import annotations

import pytest
import torch

MODEL_SHAPES = [
    (4096, 3072, 3072),  # FLUX, Qwen-Image: attention of the image stream
    (4096, 12288, 3072),  # MLP up
    (4096, 3072, 12288),  # MLP down
    (512, 3072, 3072),  # FLUX: the same of the text stream
    (512, 12288, 3072),
    (512, 3072, 12288),
    (4608, 3072, 3072),  # FLUX: a single-stream block, q, k and v
    (4608, 12288, 3072),  # proj_mlp
    (4608, 3072, 15360),  # proj_out
    (4608, 21504, 3072),  # q, k, v and proj_mlp in one
    (6889, 3072, 3072),  # Qwen-Image at 1328²
    (6889, 12288, 3072),
    (6889, 3072, 12288),
    (77, 12288, 3072),  # Qwen-Image: a short prompt
    (4224, 3840, 3840),  # Z-Image: attention
    (4224, 10240, 3840),  # w1, w3
    (4224, 3840, 10240),  # w2
    (4250, 2432, 2432),  # SD3.5 Large: K = 38 · 64
    (4096, 9728, 2432),
    (333, 2432, 9728),  # its text stream
    (4096, 1536, 1536),  # SD3.5 Medium, Wan 2.1 1.3B
    (4096, 6144, 1536),  # SD3.5 Medium
    (4096, 1536, 6144),
    (4096, 1152, 1152),  # PixArt-Σ
    (4096, 4608, 1152),
    (4096, 1152, 4608),
    (7800, 8960, 1536),  # Wan 2.1 1.3B: 17 frames of 480 x 832
    (7800, 1536, 8960),
    (2048, 5120, 5120),  # Wan 2.1 14B
    (2048, 13824, 5120),
    (2048, 5120, 13824),
    (4250, 13824, 5120),  # a number of tokens that fills no tile
    (4250, 5120, 13824),
    (2640, 14336, 3072),  # Wan 2.2 5B
    (2640, 3072, 14336),
    (6144, 2048, 2048),  # LTX 0.9: 121 frames of 512 x 768
    (6144, 8192, 2048),
    (6144, 2048, 8192),
    (6144, 4096, 4096),  # LTX 0.9.7
    (6144, 16384, 4096),
    (1536, 4096, 16384),
    (4096, 6144, 6144),  # FLUX.2: attention of the image stream
    (512, 36864, 6144),  # MLP of the text stream, up
    (512, 6144, 18432),  # and down
    (4608, 55296, 6144),  # attn.to_qkv_mlp_proj of a single-stream block
    (1024, 6144, 24576),  # attn.to_out
]
"""Layers of real models, with the token counts they see. Every (N, K) of tests/full_size_models.py is among them."""

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
"""Small problems that leave every tile, block, pipeline stage and word partly filled, on whichever kernel is planned for them."""

KERNEL_SIZES = [(1, 8), (257, 200)]
"""(M, N) that leave every GEMM kernel's tiles partly filled: its only one, and the last of several in both directions."""
KERNEL_DEPTHS = [64, 128, 192, 320, 384, 576, 1088]
"""K that give every GEMM kernel fewer steps than its pipeline has stages, and more; with e4m3 operands also half a step at the end."""

KERNEL_RANKS = [0, 32, 80]
"""No branch, one that fills what a kernel takes at once, one that leaves the last of it partly filled."""

MANY_TILES = (300, 13832)
"""(M, N) of more tiles than a Hopper has multiprocessors: a block of a persistent kernel goes on to a second one."""

RANKS = [0, 16, 32, 48, 64, 80, 128]

OPERANDS = [pytest.param(None, id="16-bit"), pytest.param(torch.float8_e4m3fn, id="e4m3")]
"""Values of `values_dtype`; conftest skips e4m3 where there are no kernels for it."""
