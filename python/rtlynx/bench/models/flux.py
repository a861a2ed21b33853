"""FLUX.1: dev, where guidance is an input, so that a step is one forward, and schnell, which is distilled to four steps and has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size


def _inputs(text: int, size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    """With so many T5 tokens, which prompts are always padded to."""
    rows, columns = size[0] // 16, size[1] // 16  # an 8 times smaller latent, in patches of 2
    place = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32) if config.guidance_embeds else None,
        "img_ids": place.to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }


FLUX = BenchModel("flux.1-dev", "FluxTransformer2DModel", partial(_inputs, 512), {"guidance_embeds": True})
FLUX_SCHNELL = BenchModel("flux.1-schnell", "FluxTransformer2DModel", partial(_inputs, 256), {"guidance_embeds": False})
