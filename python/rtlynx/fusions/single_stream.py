"""What single-stream blocks do alike: attention and feed-forward side by side, and one projection of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtlynx.fusions import fusion
from rtlynx.fusions.fusion import Fusion, gelu_of, plain
from rtlynx.linear import SparseLinear


def fusion_of(block: nn.Module) -> Fusion | None:
    """What ``proj_out`` takes in now, after ``act_mlp`` and beside the attention; None where nothing."""
    last, activation = block.proj_out, gelu_of(block.act_mlp)  # type: ignore[arg-type]
    return Fusion(last, activation, head=True) if activation is not None and plain(last, SparseLinear) else None  # type: ignore[arg-type]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """``cat([first, second], 1)``; eager without a copy where they lie so in memory, as the block before leaves them.

    Args:
        first: ``(B, S, C)``.
        second: ``(B, s, C)``.

    Returns:
        ``(B, S + s, C)``, to be read only.
    """
    if fusion.eager(first) and not torch.is_grad_enabled() and _adjacent(first, second):
        samples, tokens, channels = first.shape
        return first.as_strided((samples, tokens + second.shape[1], channels), first.stride(), first.storage_offset())
    return torch.cat([first, second], 1)


def _adjacent(first: Tensor, second: Tensor) -> bool:
    if not (type(first) is type(second) is Tensor) or (first.dtype, first.stride()) != (second.dtype, second.stride()):
        return False
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    return bool(second.storage_offset() - first.storage_offset() == first.shape[1] * first.stride(1))


def clipped(hidden_states: Tensor) -> Tensor:
    """What float16 can hold, as FLUX's blocks have it."""
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states
