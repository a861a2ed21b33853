"""From how many tokens on a layer is faster sparse than dense."""

from __future__ import annotations

import functools
from typing import Any

import torch

from rtlynx.fp8 import kernel_dtype

NEVER = 2**63 - 1
"""More tokens than there are: a layer that is never faster sparse."""


def least_tokens(device: torch.device, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None = None) -> int:
    """The smallest M with which the sparse layer is at least as fast as the dense one; 0 where it always is, or nothing is known, and
    `NEVER` where it never is.

    Args:
        device: Where the layer runs. On a CPU the reference runs, which is not about speed: 0.
        n: Output channels.
        k: Input channels.
        rank: Rank of the branch; 0 without one.
        dtype: Of the weight.
        values_dtype: Of the sparse product's operands; None: that of the weight.

    Raises:
        InvalidArgumentError: There is no kernel for such a layer.
        DeviceError: There is none for this GPU.
    """
    return _least_tokens(device, n, k, rank, dtype, values_dtype)


torch.compiler.assume_constant_result(least_tokens)  # marks it: a compiled layer holds the number and guards on nothing but M


@functools.lru_cache(maxsize=4096)
def _least_tokens(device: torch.device, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> int:
    if device.type != "cuda":
        return 0
    try:
        from rtlynx import _core
    except ImportError:  # the op that is called instead says what to do about it
        return 0
    gpu: dict[str, Any] = _core.devices()[torch.cuda.current_device() if device.index is None else device.index]
    return _core.least_tokens(
        capability=gpu["capability"],
        sms=gpu["sms"],
        memory_gb_s=gpu["memory_gb_s"],
        n=n,
        k=k,
        rank=rank,
        dtype=kernel_dtype(dtype, values_dtype),
    )
