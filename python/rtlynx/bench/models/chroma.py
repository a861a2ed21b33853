"""Chroma, a part of it: 2 of its 19 double-stream blocks and 4 of its 38 single-stream blocks, which tell what a block gains."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 512  # T5 tokens, always padded to this


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    rows, columns = size[0] // 16, size[1] // 16
    place = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_ids": place.to(device, dtype),
        "txt_ids": torch.zeros(TEXT, 3, device=device, dtype=dtype),
    }


CHROMA_PART = BenchModel("chroma-part", "ChromaTransformer2DModel", _inputs, {"num_layers": 2, "num_single_layers": 4})
