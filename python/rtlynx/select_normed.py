"""Selection from a norm that is not written to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rtlynx import ops
from rtlynx.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rtlynx.linear import SparseLinear


def select_normed(
    layer: SparseLinear, h: Tensor, stats: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> ops.Sparsified:
    """What ``layer`` selects from a norm of h, ``(h - mean) · rstd · weight + bias``, which is not written to memory.

    For `SparseLinear.multiply`, and for layers that `SparseLinear.takes_norm`. Layers of a group that ask for the same selection share one,
    eager and compiled, where they are called with the same tensor objects::

        stats = row_stats(h.flatten(0, 1))
        q, k, v = (layer.multiply(select_normed(layer, h, stats, 1 + scale, shift), h.dtype, h.shape[:-1]) for layer in (to_q, to_k, to_v))

    with ``1 + scale`` computed once.

    Args:
        layer: The layer that reads the norm.
        h: ``(..., K)`` of the layer's dtype, M tokens.
        stats: ``(M, 2)`` float32 from `rtlynx.row_stats.row_stats`.
        weight: ``(B, K)`` of the same dtype as h, B a divisor of M: M / B neighbouring tokens share a row of it; or ``(K,)``. None: 1.
        bias: Of the same shape and dtype. None: 0.

    Raises:
        InvalidArgumentError: The layer gathers its channels, or an argument does not fit.
    """
    layer.check_input("select_normed", "h", h)
    permutation, places, *arguments = layer.selection_inputs()
    if permutation is not None or places is not None:
        raise InvalidArgumentError("select_normed", "layer", "a layer with a permutation", "one that takes channels as they come")

    def select(h: Tensor) -> ops.Sparsified:
        x = h if h.dim() == 2 else h.reshape(-1, h.shape[-1])
        return ops.sparsify(x, *arguments, "none", None, None, stats, weight, bias)  # type: ignore[call-arg]  # mypy cannot count them

    if torch.compiler.is_compiling() or layer.input_group is None or layer.sharing == 1:
        return select(h)
    return layer.input_group.select(layer, h, select, stats, weight, bias)
