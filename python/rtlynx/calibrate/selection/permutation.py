"""Channel permutation: which four channels compete for two places.

Neighbouring channels of a trained layer have nothing to do with each other, so which four form a group is free: gather channels of X,
permute the columns of W alike, and the product is the same. Groups of one strong, two middling and one weak channel lose least: sort the
channels by their share of the output's energy, E[(x - m)²]‖w‖², and deal ranks i, i + n/4, i + n/2, i + 3n/4 of n into one group.

Dealt are not all K at once but the 64 of each window, 16 neighbours from every quarter of K (`rtlynx.reference.permutation_of`): a kernel
that selects can gather those on the way, where a free permutation takes a pass of its own over X. What that costs, as velocity error of
the demo's small model with joint at rank 16: 13.07 % without a permutation, 11.74 % with a free one, 11.78 % so; windows of 64 neighbours
gave 12.61 %. (``rtlynx bench quality --model small --device cpu --prompts 24 --steps 8 --batch 24
--calibration-prompts 32``)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtlynx.calibrate.selection.vectors import Selection
from rtlynx.reference import GROUP, K_MULTIPLE, PIECE


def deal_channels(selection: Selection, x: Tensor, weight_norm: Tensor) -> Selection:
    """``selection`` with channels dealt anew by their energy after its shift; x is ``(T, K)``, `weight_norm` ``(K,)``."""
    energy = weight_norm.square() * x.float().square().mean(0)
    if selection.shift is not None:
        energy = weight_norm.square() * (x.float() - _in_input_order(selection, selection.shift)).square().mean(0)
    windows = torch.arange(len(energy), device=energy.device).view(K_MULTIPLE // PIECE, -1, PIECE).transpose(0, 1).reshape(-1, K_MULTIPLE)
    ranked = energy[windows].argsort(dim=1, descending=True, stable=True)
    permutation = windows.gather(1, ranked.view(-1, GROUP, K_MULTIPLE // GROUP).transpose(1, 2).flatten(1)).flatten()

    def reorder(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else _in_input_order(selection, vector)[permutation]

    return replace(selection, permutation=permutation, shift=reorder(selection.shift), score=reorder(selection.score))


def _in_input_order(selection: Selection, vector: Tensor) -> Tensor:
    if selection.permutation is None:
        return vector
    return torch.empty_like(vector).scatter_(0, selection.permutation, vector)
