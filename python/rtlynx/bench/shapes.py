"""The layers the benches run, by name: (M, N, K) of diffusion transformers at 1024 x 1024, with few tokens, of few outputs, and ragged."""

from __future__ import annotations

FEATURES: tuple[tuple[int, int], ...] = (
    (3072, 3072),  # FLUX, Qwen-Image: attention
    (9216, 3072),  # the same, q, k and v as one
    (12288, 3072),  # MLP up
    (3072, 12288),  # MLP down
    (21504, 3072),  # FLUX: everything that reads the input of a single-stream block
    (3072, 15360),  # FLUX: proj_out of a single-stream block
    (3840, 3840),  # Z-Image: attention
    (10240, 3840),  # Z-Image: w1, w3
    (20480, 3840),  # Z-Image: both as one
    (3840, 10240),  # Z-Image: w2
    (2432, 2432),  # SD3.5 Large
    (9728, 2432),
    (2432, 9728),
    (1536, 1536),  # Wan 2.1 1.3B
    (8960, 1536),
    (1536, 8960),
    (5120, 5120),  # Wan 2.1 14B
    (13824, 5120),
    (5120, 13824),
    (1152, 1152),  # PixArt-Sigma
    (4608, 1152),
    (1152, 4608),
    (55296, 6144),  # FLUX.2: attn.to_qkv_mlp_proj of a single-stream block
    (6144, 24576),  # FLUX.2: attn.to_out of a single-stream block
)
"""(N, K) of the layers of the models there are recipes for."""

FEW_TOKENS: tuple[int, ...] = (1, 2, 4, 33, 66, 77, 132, 154, 308, 512, 1024, 2048, 3072)
"""A vector, prompts of 33 and 77 tokens, the text stream of FLUX, each once, twice and four times; then up to where images begin."""

SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "dit": (
        (4096, 3072, 3072),  # FLUX, Qwen-Image: attention of the image stream
        (4608, 9216, 3072),  # FLUX: q, k and v of a single-stream block as one
        (4608, 12288, 3072),  # FLUX: MLP up
        (4608, 3072, 12288),  # FLUX: MLP down
        (4608, 3072, 15360),  # FLUX: proj_out of a single-stream block
        (4608, 21504, 3072),  # FLUX: everything that reads the input of a single-stream block
        (4224, 3840, 3840),  # Z-Image: attention
        (4224, 20480, 3840),  # Z-Image: w1 and w3
        (4224, 3840, 10240),  # Z-Image: w2
        (8192, 8192, 12288),  # the paper's largest
    ),
    "small": tuple((m, n, k) for n, k in FEATURES for m in FEW_TOKENS),
    "narrow": tuple((m, n, k) for k in (3072, 12288) for n in (64, 128, 256, 512, 1024) for m in (77, 512, 4096)),
    "odd": (
        (6889, 3072, 3072),  # Qwen-Image at 1328 x 1328
        (4250, 9728, 2432),  # SD3.5 Large: K = 38 * 64
        (4250, 2432, 9728),
        (4096, 4608, 1152),  # PixArt-Sigma
        (4250, 13824, 5120),  # Wan 2.1 14B
        (4250, 5120, 13824),
        (4608, 55296, 6144),  # FLUX.2: attn.to_qkv_mlp_proj
    ),
}
