"""What of a layer's compensation follows from its weight, and so has to follow when the weight changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rtlynx.fingerprint import fingerprint
from rtlynx.layerwise_casting import computable

if TYPE_CHECKING:
    from rtlynx.layer_state import LayerState


_ROWS = 512
"""Compared at a time: a whole gathered weight would be one more copy of it."""


@dataclass(frozen=True)
class Derived:
    """How a compensation and the weight it was given with hang together.

    Attributes:
        digest: Of that weight.
        dtype: Of that weight: cast, it has another digest.
        permuted: Whether `sparse_weight` is the weight with permuted columns and nothing else.
        own_bias: `comp_bias` less what the shift takes from the output, on the CPU; None without a shift.
    """

    digest: str
    dtype: torch.dtype
    permuted: bool
    own_bias: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, layer: LayerState) -> Derived | None:
        """For what a layer holds now; None without a compensation, or where its weight is not there or not the one it was fitted to."""
        held = (layer.comp_down, layer.comp_bias, layer.sparse_weight)
        if layer.is_compact or layer.weight.is_meta or all(tensor is None or tensor.is_meta for tensor in held):
            return None
        shifted = None if layer.comp_bias is None or layer.shift is None else (layer.comp_bias.float() - bias_of_shift(layer)).cpu()
        return cls(_digest(layer), layer.weight.dtype, only_permuted(layer), shifted)

    def fits(self, layer: LayerState) -> bool:
        """Whether what was fitted, which cannot follow, was fitted to the weight the layer has now."""
        fitted = layer.comp_down is not None or (layer.sparse_weight is not None and not self.permuted)
        return not fitted or layer.weight.dtype != self.dtype or _digest(layer) == self.digest

    @torch.no_grad()
    def renew(self, layer: LayerState) -> None:
        """Compute again, in place, what follows from the weight."""
        if self.permuted and layer.sparse_weight is not None:
            layer.sparse_weight.copy_(in_order(layer))
        if self.own_bias is not None and layer.comp_bias is not None:
            layer.comp_bias.copy_(self.own_bias.to(layer.comp_bias.device) + bias_of_shift(layer))


def _digest(layer: LayerState) -> str:
    (digest,) = fingerprint({"": layer}).values()
    return digest


def in_order(layer: LayerState) -> Tensor:
    """The weight with its columns in the order of the gathered input."""
    return layer.weight if layer.permutation is None else computable(layer.weight)[:, layer.permutation]


def bias_of_shift(layer: LayerState) -> Tensor:
    """``shift · Wᵀ`` in float32: what the layer's output lacks because its input was shifted."""
    assert layer.shift is not None
    return in_order(layer).detach().float() @ layer.shift


def only_permuted(layer: LayerState) -> bool:
    """Whether the layer's own sparse weight is no more than its weight with permuted columns."""
    if layer.sparse_weight is None or layer.permutation is None:
        return False
    pairs = zip(layer.sparse_weight.split(_ROWS), layer.weight.split(_ROWS), strict=True)
    return all(torch.equal(computable(own), computable(rows)[:, layer.permutation]) for own, rows in pairs)
