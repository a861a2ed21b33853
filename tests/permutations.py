"""Permutations as a selection kernel can gather them, and others."""

from __future__ import annotations

import torch
from torch import Tensor


def in_windows(k: int, seed: int = 0) -> Tensor:
    """``(k,)`` int64: every window of 64 channels, 16 neighbours from each quarter of k, in an order of its own."""
    rng = torch.Generator().manual_seed(seed)
    windows = [[q * (k // 4) + 16 * u + i for q in range(4) for i in range(16)] for u in range(k // 64)]
    return torch.cat([torch.tensor(window)[torch.randperm(64, generator=rng)] for window in windows])


def free(k: int, seed: int = 0) -> Tensor:
    """``(k,)`` int64: any permutation; of k = 64 any stays in its window."""
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))
