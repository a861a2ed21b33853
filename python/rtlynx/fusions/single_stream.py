"""What single-stream blocks do alike: attention and feed-forward side by side, and one projection of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtlynx.fusions.fusion import Fusion, gelu_of, plain
from rtlynx.linear import SparseLinear


def fusion_of(block: nn.Module) -> Fusion | None:
    """What ``proj_out`` takes in now, after ``act_mlp`` and beside the attention; None where nothing."""
    last, activation = block.proj_out, gelu_of(block.act_mlp)  # type: ignore[arg-type]
    return Fusion(last, activation, head=True) if activation is not None and plain(last, SparseLinear) else None  # type: ignore[arg-type]


def clipped(hidden_states: Tensor) -> Tensor:
    """What float16 can hold, as FLUX's blocks have it."""
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states
