"""`choose`: the selection of one input, with the options that were asked for."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from rtlynx.calibrate.selection.permutation import deal_channels
from rtlynx.calibrate.selection.shift import lloyd_shift
from rtlynx.calibrate.selection.vectors import Selection, weight_norms

OPTIONS = ("shift", "permutation")
"""What may be asked for, beside nothing: a Lloyd shift, channels dealt into groups anew."""

TOKENS = 4096
"""Tokens that the options are found from: per-channel means need far fewer than second moments."""
_ROUNDS = 2


@torch.no_grad()
def choose(options: Collection[str], x: Tensor, weights: list[Tensor], plain: Selection, device: torch.device) -> Selection:
    """Find permutation and shift of one input.

    Args:
        options: Some of `OPTIONS`.
        x: ``(T, K)`` samples of the input.
        weights: Of all layers that read it, each ``(N, K)``: they share one selection, so that it runs once.
        plain: Selection without options, in the input's own order; its score and norm compensation are kept.
        device: Where to compute.
    """
    if not options:
        return plain
    x = x[:: max(1, len(x) // TOKENS)].to(device)
    norms = weight_norms(weights).to(x.device)
    selection = plain
    # The best groups depend on the shift, the best shift on who competes with whom.
    for _ in range(_ROUNDS if {"shift", "permutation"} <= set(options) else 1):
        if "permutation" in options:
            selection = deal_channels(selection, x, norms)
        if "shift" in options:
            selection = lloyd_shift(selection, x, norms)
    return selection
