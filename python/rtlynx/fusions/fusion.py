"""What the fused blocks have in common: `Fusion`, and when one is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtlynx.activations import selection_does
from rtlynx.linear import SparseLinear
from rtlynx.reference import Activation


class Fusion(NamedTuple):
    """What a layer takes into its selection.

    Attributes:
        layer: The layer.
        activation: The activation before it.
        head: Whether channels that are taken as they are come before, which were concatenated.
    """

    layer: SparseLinear
    activation: Activation
    head: bool = False

    def pays(self, tokens: int, device: torch.device) -> bool:
        """Whether the layer takes it in now, with so many tokens on ``device``, in a kernel that does it."""
        return self.layer.in_selection(tokens, device) and selection_does(device, self.activation)

    def __str__(self) -> str:
        name = {"none": "", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "silu_gate": "gated SiLU"}[self.activation]
        return " and ".join(filter(None, (name, "concatenation" if self.head else "")))


def eager(x: Tensor) -> bool:
    """Whether what is done to x is done by torch's kernels, one after another, on a GPU: then every pass over memory counts."""
    return x.is_cuda and not torch.compiler.is_compiling()


def add_gated(residual: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``residual + gate * update``: eager in one pass, rounded once.

    Args:
        residual: ``(B, S, C)``.
        gate: ``(B, C)`` or ``(B, S, C)``, of the same dtype as the others; or float32, eager and without gradients.
        update: ``(B, S, C)``.
    """
    if gate.dim() == 2:
        gate = gate.unsqueeze(1)
    if not eager(residual):
        return residual + gate * update
    if gate.dtype == residual.dtype:
        return torch.addcmul(residual, gate, update)
    return torch.addcmul(residual, gate, update, out=torch.empty_like(residual))


def add_projected(residual: Tensor, gate: Tensor | None, x: Tensor, projection: Any, *others: nn.Module) -> Tensor:
    """``residual + gate * projection(x)``, by the projection's product where that is sparse now and nothing comes between.

    Args:
        residual: ``(B, S, N)``.
        gate: See `add_gated`; the product takes that of a sample, in the dtype of the residual. None: 1.
        x: ``(B, S, K)``.
        projection: Linear.
        others: What follows it: dropout.
    """
    x = x.contiguous()
    in_product = plain(projection, SparseLinear) and all(map(inactive, others)) and (gate is None or gate.dim() == 2)
    if in_product and projection.in_selection(x.shape[:-1].numel(), x.device):
        return projection.forward_gated(x, residual, None if gate is None else gate.type_as(residual))  # type: ignore[no-any-return]
    update = projection(x)
    for module in others:
        update = module(update)
    return residual + update if gate is None else add_gated(residual, gate, update)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what `kind` does and nothing else.

    Not when it is a subclass or a wrapper (peft), has hooks (calibration), or a forward of its own (offloading).
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def gelu_of(module: nn.Module) -> Activation | None:
    """Which activation an ``nn.GELU`` is; None if the module is something else, or more than that."""
    return gelu_named(module.approximate) if plain(module, nn.GELU) else None  # type: ignore[arg-type]


def gelu_named(approximate: str) -> Activation | None:
    """The GELU that torch knows by this approximation."""
    return "gelu_tanh" if approximate == "tanh" else "gelu" if approximate == "none" else None


def inactive(dropout: nn.Module) -> bool:
    """Whether it is a dropout that does nothing now."""
    return plain(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)  # type: ignore[return-value]
