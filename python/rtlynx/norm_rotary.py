"""What a block does to queries and keys between projection and attention, norm, concatenation and rotation: ``rtlynx::norm_rotary``.

On a GPU it is one kernel that reads its input once and writes once; CPU tensors run `rtlynx.reference_rotary`. Traced by ``torch.compile``.
It has no gradients.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from rtlynx import checks, launch, ops, reference_rotary  # noqa: F401 - `ops` defines the library of which this is a fragment
from rtlynx.direct import direct
from rtlynx.errors import InvalidArgumentError
from rtlynx.inductor import teach_norm_rotary

__all__ = ["MAX_HEAD_DIM", "available", "norm_rotary", "takes"]

MAX_HEAD_DIM = 256
"""The most channels of a head: what a warp takes, 8 a lane."""
DIM_MULTIPLE = 8
"""Channels of a head are a multiple of this: 16-byte loads."""

_OP = "norm_rotary"

_library = torch.library.Library("rtlynx", "FRAGMENT")
_library.define(
    "norm_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps, Tensor? first, Tensor? first_weight, float first_eps)"
    " -> Tensor"
)


def norm_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    first: Tensor | None = None,
    first_weight: Tensor | None = None,
    first_eps: float = 1e-6,
) -> Tensor:
    """Heads normed, behind those of ``first``, and rotated: pair i of channels, ``(a, b)``, to ``(a cos - b sin, a sin + b cos)``.

    The norm is rounded to T, as ``F.rms_norm`` does, and so is what is rotated; all else is float32.

    Args:
        x: ``(B, S, H, D)`` of dtype T: bfloat16 or float16, also float32 on the CPU. D a multiple of 8, at most 256. Read in place where
            channels are neighbours and all other strides multiples of 8 elements, as in a part of a fused projection; else copied.
        cos: ``(S0 + S, D / 2)`` float32, read in place if it has the strides of `sin`.
        sin: The same of the sines.
        weight: ``(D,)`` of dtype T, of the norm over the channels of each head of x; None: x is rotated as it is.
        eps: Added to the mean of squares.
        first: ``(B, S0, H, D)`` of dtype T, the tokens that come before those of x; None: S0 is 0.
        first_weight: As `weight`, of ``first``.
        first_eps: As `eps`, of ``first``.

    Returns:
        ``(B, S0 + S, H, D)`` of dtype T, contiguous.

    Raises:
        InvalidArgumentError: a dtype or shape does not fit, an eps is negative or not finite, or gradients are wanted; nothing has been
            launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    tensors = x, cos, sin, weight, first, first_weight
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        _refuse_gradients()
    if direct(*tensors):
        return _cuda(x, cos, sin, weight, eps, first, first_weight, first_eps)
    return torch.ops.rtlynx.norm_rotary(x, cos, sin, weight, eps, first, first_weight, first_eps)  # type: ignore[no-any-return]


def available(device: torch.device) -> bool:
    """Whether there is a kernel of it for this GPU. What is not a GPU is better served by torch's own operations."""
    return device.type == "cuda" and launch.why_no_kernels(device) is None


torch.compiler.assume_constant_result(available)  # marks it: a compiled block holds the answer


def takes(dim: int) -> bool:
    """Whether heads may have so many channels."""
    return 0 < dim <= MAX_HEAD_DIM and dim % DIM_MULTIPLE == 0


def _refuse_gradients() -> NoReturn:
    raise InvalidArgumentError(_OP, "x", "a call that wants gradients", "one without: it has none; norm and rotate by torch's operations")


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    first: Tensor | None,
    first_weight: Tensor | None,
    first_eps: float,
) -> int:
    """Refuse what does not fit; returns S0 + S."""
    if x.dim() != 4:
        raise InvalidArgumentError(_OP, "x", f"{x.dim()} dimensions", "4 dimensions (B, S, H, D)")
    checks.check_dtype(_OP, "x", x.dtype, x.device)
    samples, tokens, heads, dim = x.shape
    if not takes(dim):
        raise InvalidArgumentError(_OP, "x", f"D = {dim}", f"D a multiple of {DIM_MULTIPLE}, from {DIM_MULTIPLE} to {MAX_HEAD_DIM}")
    if first is not None:
        checks.check(_OP, "first", first, (samples, None, heads, dim), x.dtype, x.device)
        tokens += first.shape[1]
    elif first_weight is not None:
        raise InvalidArgumentError(_OP, "first_weight", "a weight without `first`", "both or neither")
    for argument, vector in (("weight", weight), ("first_weight", first_weight)):
        if vector is not None:
            checks.check(_OP, argument, vector, (dim,), x.dtype, x.device)
    for argument, angles in (("cos", cos), ("sin", sin)):
        checks.check(_OP, argument, angles, (tokens, dim // 2), torch.float32, x.device)
    checks.check_eps(_OP, eps)
    checks.check_eps(_OP, first_eps)
    return tokens


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    _check(x, *arguments)
    return reference_rotary.norm_rotary(x, *arguments)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    teach_norm_rotary()
    samples, _, heads, dim = x.shape
    return x.new_empty(samples, _check(x, *arguments), heads, dim)


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    samples, _, heads, dim = x.shape
    out = x.new_empty(samples, _check(x, *arguments), heads, dim)
    launch.norm_rotary(x, *arguments, out)  # type: ignore[call-arg]  # mypy cannot count them
    return out


def _backward(_ctx: Any, _grad: Tensor) -> NoReturn:
    _refuse_gradients()


_library.impl(_OP, _cpu, "CPU")
_library.impl(_OP, _cuda, "CUDA")
torch.library.register_fake("rtlynx::norm_rotary", _fake, lib=_library)
torch.library.register_autograd("rtlynx::norm_rotary", _backward, lib=_library)
