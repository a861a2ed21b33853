"""FLUX.1-dev: guidance is an input, so a step is one forward."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 512  # T5 tokens, always padded to this


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    rows, columns = size[0] // 16, size[1] // 16  # an 8 times smaller latent, in patches of 2
    place = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
        "img_ids": place.to(device, dtype),
        "txt_ids": torch.zeros(TEXT, 3, device=device, dtype=dtype),
    }


FLUX = BenchModel("flux.1-dev", "FluxTransformer2DModel", _inputs, {"guidance_embeds": True})
