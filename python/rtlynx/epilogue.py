"""What a block does with the output of a layer, ``residual + gate · y``: as diffusers writes it, and when the layer's product does it."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx.checks import check
from rtlynx.errors import InvalidArgumentError


def check_residual(op: str, x: Tensor, n: int, residual: Tensor | None, gate: Tensor | None, gate_name: str = "gate") -> None:
    """Refuse a residual and a gate that do not go with the output of a layer for x.

    Args:
        op: What was called, for the error.
        x: ``(B, S, K)``, or ``(..., K)`` without a gate.
        n: N, the layer's output channels.
        residual: ``(B, S, N)`` of the dtype of x, ``(..., N)`` without a gate; None where there is nothing to add to.
        gate: ``(B, N)`` of the dtype of x, or None.
        gate_name: What `op` calls the gate.
    """
    if residual is not None:
        check(op, "residual", residual, (*x.shape[:-1], n), x.dtype, x.device)
    if gate is None:
        return
    if residual is None:
        raise InvalidArgumentError(op, "residual", "None", f"a tensor, since `{gate_name}` is given")
    if x.dim() != 3:
        raise InvalidArgumentError(op, "x", f"{x.dim()} dimensions", f"3 dimensions (B, S, K), since `{gate_name}` is given")
    check(op, gate_name, gate, (x.shape[0], n), x.dtype, x.device)


def added(y: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """``residual + gate.unsqueeze(1) * y``, of y ``(B, S, N)``; y itself without a residual."""
    if residual is None:
        return y
    return residual + (y if gate is None else gate.unsqueeze(1) * y)


def in_product(residual: Tensor) -> bool:
    """Whether the product adds to the residual.

    Not for gradients, which would compute it again, nor where a copy would come first. Nor in compiled code, where inductor merges the sum
    with what comes next: FLUX.1's step gained nothing from the sum in the product (docs/kernels.md).
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and residual.is_contiguous()
