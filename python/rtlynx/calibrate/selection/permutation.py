"""Channel permutation: which four channels compete for two places.

Neighbouring channels of a trained layer have nothing to do with each other, so which four form a group is free: gather channels of X,
permute the columns of W alike, and the product is the same. Groups of one strong, two middling and one weak channel lose least: sort the
channels by their share of the output's energy, E[(x - m)²]‖w‖², and deal ranks i, i + K/4, i + K/2, i + 3K/4 into one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtlynx.calibrate.selection.vectors import Selection
from rtlynx.reference import GROUP


def deal_channels(selection: Selection, x: Tensor, weight_norm: Tensor) -> Selection:
    """``selection`` with channels dealt anew by their energy after its shift; x is ``(T, K)``, `weight_norm` ``(K,)``."""
    energy = weight_norm.square() * x.float().square().mean(0)
    if selection.shift is not None:
        energy = weight_norm.square() * (x.float() - _in_input_order(selection, selection.shift)).square().mean(0)
    ranked = energy.argsort(descending=True, stable=True)
    permutation = ranked.view(GROUP, -1).T.flatten()

    def reorder(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else _in_input_order(selection, vector)[permutation]

    return replace(selection, permutation=permutation, shift=reorder(selection.shift), score=reorder(selection.score))


def _in_input_order(selection: Selection, vector: Tensor) -> Tensor:
    if selection.permutation is None:
        return vector
    return torch.empty_like(vector).scatter_(0, selection.permutation, vector)
