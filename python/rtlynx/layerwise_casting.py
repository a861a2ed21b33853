"""Weights that diffusers' layerwise casting stores in 8 bits until their layer runs: how they are read, and what is refused of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from rtlynx.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rtlynx.layer_state import LayerState


def computable(weight: Tensor) -> Tensor:
    """A weight as its layer computes with it: torch computes little in 8 bits. Nothing is rounded, wider dtypes have all these numbers."""
    return weight.float() if in_8_bits(weight) else weight


def refuse_stored(op: str, layers: Mapping[str, LayerState]) -> None:
    """Refuse ``op``, which needs the weights as they were before they were rounded to 8 bits.

    Args:
        op: What is refused.
        layers: Name → the layers it is about. Compact ones have their own errors: their weight is the e4m3 one wherever it is.

    Raises:
        InvalidArgumentError: The weight of one of them is stored so.
    """
    stored = [name for name, layer in layers.items() if in_8_bits(layer.weight) and not layer.is_compact]
    if stored:
        dtype = str(layers[stored[0]].weight.dtype).removeprefix("torch.")
        got = f"{len(stored)} layers (first {stored[0]}) whose weights layerwise casting stores in {dtype}"
        raise InvalidArgumentError(op, "pipe_or_module", got, "a model from before that: call it before enable_layerwise_casting")


def in_8_bits(weight: Tensor) -> bool:
    """Whether it is stored so."""
    return weight.dtype.itemsize == 1
