"""LTX-Video 0.9.7 13B, a part of it: 8 of its 48 blocks, which tell what a block gains; 97 frames."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 256  # T5 tokens, always padded to this
FRAMES = 97  # 13 latent frames: the first, then one for every eight


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    frames, height, width = (FRAMES - 1) // 8 + 1, size[0] // 32, size[1] // 32
    return {
        "hidden_states": torch.randn(1, frames * height * width, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.caption_channels, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_attention_mask": torch.ones(1, TEXT, device=device, dtype=torch.bool),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


LTX_PART = BenchModel(
    "ltx-video-13b-part",
    "LTXVideoTransformer3DModel",
    _inputs,
    {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 8},
    size=(512, 768),
)
