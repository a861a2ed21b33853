"""Mean and deviation of every row, ``rtlynx::row_stats``: what has to be known of a norm before the selection can do the rest of it.

On a GPU it is one kernel that reads its input once; CPU tensors run `rtlynx.reference`. Traced by ``torch.compile`` and differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx import checks, launch, ops, reference  # noqa: F401 - `ops` defines the library of which this is a fragment
from rtlynx.direct import direct
from rtlynx.errors import InvalidArgumentError
from rtlynx.reference import K_MULTIPLE

__all__ = ["row_stats"]

_OP = "row_stats"

_library = torch.library.Library("rtlynx", "FRAGMENT")
_library.define("row_stats(Tensor h, bool centered, float eps) -> Tensor")


def row_stats(h: Tensor, centered: bool = True, eps: float = 1e-6) -> Tensor:
    """Mean and ``1 / sqrt(variance + eps)`` of every row, for `rtlynx.ops.sparsify`'s ``norm_stats``.

    In code that is being compiled these are operations of torch, not the op: inductor fuses them with what makes h.

    Args:
        h: ``(M, K)`` of dtype T: bfloat16 or float16, also float32 on the CPU. K a multiple of 64, any M ≥ 0. Copied if its last dimension
            is strided or its rows are not 16-byte aligned.
        centered: As LayerNorm has it: the variance is the mean of squared deviations. False: as RMSNorm has it: the mean is taken to be 0.
        eps: Added to the variance.

    Returns:
        ``(M, 2)`` float32: mean and rstd.

    Raises:
        InvalidArgumentError: a dtype or shape does not fit, or `eps` is negative or not finite; nothing has been launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    if torch.compiler.is_compiling():
        _check(h, eps)
        return reference.row_stats(h, centered, eps)
    if direct(h):
        return _cuda(h, centered, eps)
    return torch.ops.rtlynx.row_stats(h, centered, eps)  # type: ignore[no-any-return]


def _check(h: Tensor, eps: float) -> None:
    if h.dim() != 2:
        raise InvalidArgumentError(_OP, "h", f"{h.dim()} dimensions", "2 dimensions (M, K)")
    checks.check_dtype(_OP, "h", h.dtype, h.device)
    k = h.shape[1]
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(_OP, "h", f"K = {k}", f"K a positive multiple of {K_MULTIPLE}")
    checks.check_eps(_OP, eps)


def _output(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], 2, dtype=torch.float32)


def _cpu(h: Tensor, centered: bool, eps: float) -> Tensor:
    _check(h, eps)
    return reference.row_stats(h, centered, eps) if len(h) else _output(h)  # torch warns of a variance of nothing


def _fake(h: Tensor, centered: bool, eps: float) -> Tensor:
    _check(h, eps)
    return _output(h)


def _cuda(h: Tensor, centered: bool, eps: float) -> Tensor:
    _check(h, eps)
    stats = _output(h)
    launch.row_stats(h, stats, centered, eps)
    return stats


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, ctx.centered, _ = inputs
    ctx.save_for_backward(h, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    h, stats = ctx.saved_tensors
    return reference.row_stats_backward(grad, h, stats, ctx.centered), None, None


_library.impl(_OP, _cpu, "CPU")
_library.impl(_OP, _cuda, "CUDA")
torch.library.register_fake("rtlynx::row_stats", _fake, lib=_library)
torch.library.register_autograd("rtlynx::row_stats", _backward, setup_context=_setup, lib=_library)
