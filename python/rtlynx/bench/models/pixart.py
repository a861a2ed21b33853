"""PixArt-Σ."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 300  # T5 tokens, always padded to this


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, size[0] // 8, size[1] // 8, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.caption_channels, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, TEXT, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


PIXART = BenchModel("pixart-sigma", "PixArtTransformer2DModel", _inputs, {"caption_channels": 4096, "use_additional_conditions": False})
