"""The Lloyd shift: subtract from every channel what it is when it is dropped, so that dropping it costs least.

S(X - m)Wᵀ + mWᵀ is exact in what is kept, whatever m is, and the second term is a bias. Given the mask the best m_j is the mean of x_j over
the tokens that drop channel j; a new m moves the mask, so the two alternate, as in Lloyd's quantizer (S. Lloyd, "Least squares quantization
in PCM", 1982). Where they end depends on where they start. Plain zero suits the one-sided outputs of a GELU, whose small values
are the ones dropped; the mean suits channels with a large constant part, which from zero would never be dropped and so never learn their
shift. Both are tried.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtlynx import reference
from rtlynx.calibrate.selection.vectors import Selection

ROUNDS = 12


def lloyd_shift(selection: Selection, x: Tensor, weight_norm: Tensor, rounds: int = ROUNDS) -> Selection:
    """``selection`` with the better of the two shifts; x is ``(T, K)``."""
    mean = selection.gather(x.float().mean(0))
    starts = [torch.zeros_like(mean), mean]
    if selection.shift is not None:
        starts.append(selection.shift)
    found = [_descend(replace(selection, shift=start), x, rounds) for start in starts]
    losses = [float(candidate.loss(x, weight_norm)) for candidate in found]
    return found[losses.index(min(losses))]


def _descend(selection: Selection, x: Tensor, rounds: int) -> Selection:
    gathered = selection.gather(x)
    for _ in range(rounds):
        assert selection.shift is not None
        dropped = ~reference.keep_mask(reference.shifted(gathered, selection.shift), selection.score)
        count = dropped.sum(0)
        mean = gathered.float().masked_fill(~dropped, 0).sum(0) / count.clamp_min(1)
        selection = replace(selection, shift=torch.where(count > 0, mean, selection.shift))
    return selection
