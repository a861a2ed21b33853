"""Stable Diffusion 3.5 large."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 77 + 256  # CLIP's tokens, then T5's, always padded to these


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, size[0] // 8, size[1] // 8, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
    }


SD3 = BenchModel(
    "sd3.5-large",
    "SD3Transformer2DModel",
    _inputs,
    {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
)
