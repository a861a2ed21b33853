"""The demo's transformer: diffusers' `FluxTransformer2DModel` in sizes from a test's to 143 M parameters, pixels in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from .captions import EMBED_CHANNELS, MAX_TOKENS, WORD_CHANNELS
from .drawing import SIZE

PATCH = 4  # pixels a side; a token is a patch's 4 x 4 x 3 pixels
GRID = SIZE // PATCH
TOKENS = GRID * GRID
CHANNELS = 3 * PATCH * PATCH


@dataclass(frozen=True)
class Preset:
    """A size of model with the training settings that suit it."""

    heads: int
    head_dim: int
    double: int  # double-stream blocks
    single: int  # single-stream blocks
    batch: int
    learning_rate: float

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


# `small` ships with the package. At the same size 192 wide and 8 blocks deep has twice the depth of 256 wide with 4 blocks, and
# depth is what composing "which shape where" and drawing sharp edges needs; most blocks are single-stream because those spend
# 15 d^2 parameters on what a double-stream block spends 36 d^2 on. All widths are multiples of 64, which 2:4 compression needs.
PRESETS = {
    "tiny": Preset(heads=1, head_dim=64, double=1, single=1, batch=8, learning_rate=1e-3),
    "small": Preset(heads=3, head_dim=64, double=1, single=7, batch=512, learning_rate=1.5e-3),
    "medium": Preset(heads=6, head_dim=64, double=2, single=6, batch=512, learning_rate=8e-4),
    "large": Preset(heads=8, head_dim=128, double=2, single=4, batch=256, learning_rate=3e-4),
}


def build_transformer(preset: Preset, seed: int = 0) -> FluxTransformer2DModel:
    """A freshly initialised float32 transformer on the CPU; the seed decides every weight."""
    rotary = 2 * (preset.head_dim // 16)  # even; the text axis gets what two image axes of 3/8 each leave
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=CHANNELS,
            num_layers=preset.double,
            num_single_layers=preset.single,
            attention_head_dim=preset.head_dim,
            num_attention_heads=preset.heads,
            joint_attention_dim=EMBED_CHANNELS,
            pooled_projection_dim=WORD_CHANNELS,
            guidance_embeds=False,
            axes_dims_rope=(preset.head_dim - 6 * rotary, 3 * rotary, 3 * rotary),
        )
        _initialise(transformer)
    return transformer


def _initialise(transformer: FluxTransformer2DModel) -> None:
    """Xavier for every linear; zero for the modulations and the output, so that each block starts as the identity.

    adaLN-Zero: W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers", https://arxiv.org/abs/2212.09748
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, 64, 64) to tokens (n, 256, 48), patch rows first, as FLUX packs its latents."""
    n = pictures.shape[0]
    return pictures.reshape(n, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, TOKENS, CHANNELS)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    n = tokens.shape[0]
    return tokens.reshape(n, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIZE, SIZE)


def position_ids(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``img_ids`` (256, 3) with (0, row, column) and ``txt_ids`` (16, 3) of zeros, float32, as FLUX makes them."""
    axis = torch.arange(GRID, device=device, dtype=torch.float32)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    image = torch.stack([torch.zeros_like(row), row, column], 2).reshape(TOKENS, 3)
    return image, torch.zeros(MAX_TOKENS, 3, device=device)


def model_time(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The ``timestep`` to give the transformer for noise levels sigma in [0, 1], so that all dtypes read the same clock.

    diffusers' FLUX multiplies the time by 1000 in the dtype of its activations. In bfloat16 that leaves 8 significant bits, a
    clock of coarse ticks, and the model is trained with it. Wider dtypes would see times between the ticks, which training never
    showed, so they get the bfloat16 ticks too.
    """
    if dtype == torch.bfloat16:
        return sigma
    return (sigma.to(torch.bfloat16) * 1000).float() / 1000
