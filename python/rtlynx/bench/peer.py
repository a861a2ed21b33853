"""What a peer is given and gives: one layer, calls by name, or why it is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rtlynx.reference import Sparsified

Calls = Mapping[str, Callable[[], object]]
"""By column of layer.csv without ``_ms``. A peer with several kernels for one product has a call for each, ``column:kernel``."""


@dataclass(frozen=True)
class Operands:
    """One layer: x ``(M, K)``, weight ``(N, K)``, bias ``(N,)``, comp_down ``(K, r)`` and comp_up ``(N, r)`` or None, and x compressed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    comp_down: Tensor | None
    comp_up: Tensor | None
    sparse: Sparsified


class Unavailable(Exception):
    """The peer is not there; the message says what is missing."""
