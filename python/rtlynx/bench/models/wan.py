"""Wan 2.1 14B, text to video: one of the two forwards that guidance takes, 33 frames."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 512  # UMT5 tokens, always padded to this
FRAMES = 33  # 9 latent frames: the first, then one for every four


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    latent = (config.in_channels, (FRAMES - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    return {
        "hidden_states": torch.randn(1, *latent, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, config.text_dim, device=device, dtype=dtype),
    }


WAN = BenchModel("wan-2.1-14b", "WanTransformer3DModel", _inputs, size=(480, 832))
