"""FP8, the second operand precision: the weight's e4m3 copy, the extension's names for what a product is made of, and who can run it.

Only the two operands of the sparse product are e4m3; branch, bias and output stay in the model's dtype T. `rtlynx.reference` defines the
arithmetic.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rtlynx.errors import InvalidArgumentError
from rtlynx.reference import E4M3, E4M3_MAX, e4m3

CAPABILITY = (9, 0)
"""The compute capability that has kernels for it: Hopper."""

_SUFFIX = "_e4m3"


@functools.cache
def kernel_dtype(dtype: torch.dtype, values_dtype: torch.dtype | None = None) -> str:
    """The extension's name for the element types of a product: ``"bfloat16"``, or ``"bfloat16_e4m3"`` with e4m3 operands.

    Args:
        dtype: T, of branch, bias and output.
        values_dtype: Of the two operands; None: T.
    """
    name = str(dtype).removeprefix("torch.")
    return f"{name}{_SUFFIX}" if values_dtype is E4M3 else name


def element_types(name: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Inverse of `kernel_dtype`."""
    return getattr(torch, name.removesuffix(_SUFFIX)), E4M3 if name.endswith(_SUFFIX) else None


def quantize_weight(weight: Tensor, values_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The e4m3 copy of a weight with a scale for each output channel, the largest for which no element saturates.

    Args:
        weight: ``(N, K)`` of dtype T.
        values_scale: What the values that it will be multiplied with were scaled by.

    Returns:
        ``(N, K)`` e4m3, ``W_n / s_n`` rounded, and the ``(N,)`` float32 ``weight_scale`` of `rtlynx.ops.sparse_linear`,
        ``s_n / values_scale``, with ``s_n = max|W_n| / 448`` (1 for a row of zeros).
    """
    scale = torch.linalg.vector_norm(weight, math.inf, dim=1, dtype=torch.float32) / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return e4m3(weight / scale[:, None]), scale / values_scale


def dequantized_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an e4m3 weight stands for, rounded to ``dtype`` once.

    Args:
        weight: ``(N, K)`` e4m3.
        scale: ``(N,)`` float32 ``s_n`` of `quantize_weight`, without a `values_scale`.
        dtype: T.

    Returns:
        ``(N, K)`` of dtype T.
    """
    return weight.to(dtype).mul_(scale[:, None])  # e4m3 is exact in T, and the product is computed in float32: no copy of that size


def check_values_scale(op: str, scale: float) -> None:
    """Refuse a scale that would round values twice.

    Raises:
        InvalidArgumentError: ``scale`` is not a power of two.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf or math.frexp(scale)[0] != 0.5:
        raise InvalidArgumentError(op, "values_scale", repr(scale), "a power of two")


def values_scale_for(peak: float) -> float:
    """The scale for kept values of which the largest seen is ``peak``: 1, or the power of two that brings them into e4m3's range.

    Twice the largest one seen still fits: those that calibration did not see may be larger. Nothing is scaled up, since e4m3 keeps its
    relative precision down to 1/64.
    """
    return 1.0 if 2 * peak <= E4M3_MAX else 2.0 ** -math.ceil(math.log2(2 * peak / E4M3_MAX))


def missing_kernels(device: torch.device) -> str | None:
    """Why layers on this device cannot multiply in fp8, or None if they can. On a CPU the reference does."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == CAPABILITY:
        return None
    needed = f"{CAPABILITY[0]}.{CAPABILITY[1]}"
    return f'fp8 needs compute capability {needed}, and {device} has {major}.{minor}; use precision="model" there'
