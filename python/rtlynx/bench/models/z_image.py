"""Z-Image: one sample, as Turbo runs it without guidance."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 128  # tokens of a prompt; a multiple of 32, which the model pads to


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    return {
        "x": [torch.randn(config.in_channels, 1, size[0] // 8, size[1] // 8, device=device, dtype=dtype)],
        "t": torch.full((1,), 0.5, device=device, dtype=dtype),
        "cap_feats": [torch.randn(TEXT, config.cap_feat_dim, device=device, dtype=dtype)],
    }


Z_IMAGE = BenchModel("z-image", "ZImageTransformer2DModel", _inputs)
