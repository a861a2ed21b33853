"""HunyuanVideo, a part of it: 2 of its 20 double- and 4 of its 40 single-stream blocks, which tell what a block gains; 9 frames."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 256  # tokens of the prompt, always padded to this
FRAMES = 9  # 3 latent frames: the first, then one for every four


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    latent = (config.in_channels, (FRAMES - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    return {
        "hidden_states": torch.randn(1, *latent, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, TEXT, config.text_embed_dim, device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, TEXT, device=device, dtype=torch.bool),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
    }


HUNYUAN_VIDEO_PART = BenchModel(
    "hunyuan-video-part", "HunyuanVideoTransformer3DModel", _inputs, {"num_layers": 2, "num_single_layers": 4}, size=(480, 832)
)
