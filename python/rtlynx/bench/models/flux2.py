"""FLUX.2-dev, a part of it: 1 of its 8 double-stream blocks and 6 of its 48 single-stream blocks, which tell what a block gains."""

from __future__ import annotations

from typing import Any

import torch

from rtlynx.bench.models.bench_model import BenchModel, Size

TEXT = 512  # tokens of the prompt, always padded to this


def _inputs(size: Size, device: torch.device, dtype: torch.dtype, config: Any) -> dict[str, Any]:
    rows, columns = size[0] // 16, size[1] // 16
    zero = torch.arange(1)
    return {
        "hidden_states": torch.randn(1, rows * columns, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "img_ids": torch.cartesian_prod(zero, torch.arange(rows), torch.arange(columns), zero).to(device),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT)).to(device),
    }


FLUX2_PART = BenchModel("flux.2-dev-part", "Flux2Transformer2DModel", _inputs, {"num_layers": 1, "num_single_layers": 6})
