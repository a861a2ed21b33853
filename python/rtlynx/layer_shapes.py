"""Which tensors can be the compensation of a layer: the checks before any of them is taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtlynx.config import Branch
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import check_values_scale
from rtlynx.reference import MAX_RANK, RANK_MULTIPLE


def branch_problem(layer: nn.Linear, branch: Branch, comp_down: Tensor | None, comp_up: Tensor | None) -> tuple[str, str] | None:
    """(got, expected) when the two factors cannot be the layer's branch of this kind."""
    if comp_down is None and comp_up is None:
        return None
    if branch == "none":
        return "a branch", 'none, since the layer has branch="none"'
    if comp_down is None or comp_up is None:
        return "one of them", "both or neither"
    rank = comp_down.shape[-1]
    shapes = tuple(comp_down.shape), tuple(comp_up.shape)
    if shapes != ((layer.in_features, rank), (layer.out_features, rank)) or rank % RANK_MULTIPLE or not 0 < rank <= MAX_RANK:
        expected = f"({layer.in_features}, r) and ({layer.out_features}, r), r a multiple of {RANK_MULTIPLE} up to {MAX_RANK}"
        return f"shapes {shapes[0]} and {shapes[1]}", expected
    return None


def bias_shape(layer: nn.Linear, comp_bias: Tensor | None) -> tuple[int, ...]:
    """The shape a `comp_bias` with as many dimensions must have: ``(N,)`` or ``(G, N)``."""
    grouped = comp_bias is not None and comp_bias.dim() == 2 and len(comp_bias) > 0
    return (len(comp_bias), layer.out_features) if comp_bias is not None and grouped else (layer.out_features,)


def check_compensation(
    op: str,
    layer: nn.Linear,
    branch: Branch,
    *,
    comp_down: Tensor | None,
    comp_up: Tensor | None,
    shift: Tensor | None,
    comp_bias: Tensor | None,
    permutation: Tensor | None,
    sparse_weight: Tensor | None,
    values_scale: Tensor | float,
) -> None:
    """Refuse what `SparseLinear.set_compensation` cannot take for a layer with a branch of this kind; the layer may still be a dense one.

    Raises:
        InvalidArgumentError: A shape does not fit, `values_scale` is no power of two, or a branch is given where there is none.
    """
    if problem := branch_problem(layer, branch, comp_down, comp_up):
        raise InvalidArgumentError(op, "comp_down and comp_up", *problem)
    n, k = layer.out_features, layer.in_features
    given = {"shift": (shift, (k,)), "comp_bias": (comp_bias, bias_shape(layer, comp_bias)), "permutation": (permutation, (k,))}
    for name, (tensor, shape) in {**given, "sparse_weight": (sparse_weight, (n, k))}.items():
        if tensor is not None and tensor.shape != shape:
            raise InvalidArgumentError(op, name, f"shape {tuple(tensor.shape)}", f"{shape}")
    if isinstance(values_scale, Tensor) and values_scale.numel() != 1:
        raise InvalidArgumentError(op, "values_scale", f"shape {tuple(values_scale.shape)}", "a number, or a tensor of one element")
    check_values_scale(op, float(values_scale))
    if permutation is not None and not torch.equal(permutation.sort().values.cpu(), torch.arange(k)):
        raise InvalidArgumentError(op, "permutation", "channels missing or twice", "each of K once")
