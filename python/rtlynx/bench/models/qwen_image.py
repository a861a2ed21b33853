"""Qwen-Image: one of the two forwards that guidance takes, with a prompt that fills its length, as the pipeline passes it."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 256  # tokens of a long prompt; not padded


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    rows, columns = size[0] // 16, size[1] // 16
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, rows, columns)]],
    }


QWEN_IMAGE = BenchModel("qwen-image", "QwenImageTransformer2DModel", _inputs)
