"""The semantics of ``rtlynx::norm_rotary`` in plain torch: as `rtlynx.reference`, the CPU implementation and the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """``cat([norm(first), norm(x)], 1)``, rotated. The norm is rounded to T as torch's, then the rotated to T; all between is float32.

    Args and returns: those of `rtlynx.norm_rotary.norm_rotary`.
    """
    parts = [_normed(x, weight, eps)]
    if first is not None:
        parts.insert(0, _normed(first, first_weight, first_eps))
    a, b = torch.cat(parts, 1).float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight * (rstd * wide)).to(x.dtype)
