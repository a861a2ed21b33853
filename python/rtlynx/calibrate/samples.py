"""`Reservoir`: a bounded, stratified random sample of the tokens that one input of the model was given."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TOKENS = 8192
"""Kept of narrow inputs too: their branches are not larger, relative to them, than those of wide ones, but their noise is."""
_SHRINK = 0.85
"""Factor on the sampling rate each time the buffer is full: at the end it is between this and 1 full."""


@dataclass(frozen=True)
class Samples:
    """Tokens of one input.

    Attributes:
        x: ``(T, K)``, in the model's dtype.
        step: ``(T,)`` int32: the how-manieth call of its run each token was read in, which is its sampling step where the model runs
            once per step.
        level: ``(T,)`` float32: the noise level of that call, 1 for noise and 0 for a picture; NaN where nobody asked for it.
    """

    x: Tensor
    step: Tensor
    level: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]


class Reservoir:
    """Keeps at most ``capacity`` tokens, each seen one with the same probability, in memory that is taken once.

    Every token draws a key in [0, 1) and stays while its key is below the sampling rate, which falls whenever the buffer is full. Within a
    call the keys are a random permutation of an even grid, so every call, and with it every timestep and prompt, contributes its share
    exactly. Keys come from a CPU generator: every device samples the same tokens.

    Args:
        capacity: Tokens kept at most.
        channels: K.
        dtype: Of the tokens.
        device: Where they are kept; tokens are moved there.
        seed: Decides which tokens are kept.

    Attributes:
        seen: Tokens offered so far.
    """

    def __init__(self, capacity: int, channels: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self._rate = 1.0
        self._used = 0
        self._x = torch.empty(capacity, channels, dtype=dtype, device=device)
        self._key = torch.empty(capacity, dtype=torch.float64)
        self._step = torch.empty(capacity, dtype=torch.int32)
        self._level = torch.empty(capacity)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def add(self, x: Tensor, step: int, level: float = math.nan) -> None:
        """Offer the tokens of one call, ``(tokens, K)``."""
        tokens = x.shape[0]
        self.seen += tokens
        offset = torch.rand((), generator=self._generator, dtype=torch.float64)
        key = (torch.randperm(tokens, generator=self._generator) + offset) / max(tokens, 1)
        chosen = (key < self._rate).nonzero()[:, 0]
        while self._used + len(chosen) > self.capacity:
            self.lower_rate(self._rate * _SHRINK)
            chosen = chosen[key[chosen] < self._rate]
        new = slice(self._used, self._used + len(chosen))
        self._x[new] = x[chosen.to(x.device)].to(self._x)
        self._key[new], self._step[new], self._level[new] = key[chosen], step, level
        self._used = new.stop

    def samples(self) -> Samples:
        """What is kept now; views of the buffer."""
        return Samples(self._x[: self._used], self._step[: self._used], self._level[: self._used])

    @property
    def rate(self) -> float:
        """The share of the tokens offered so far that is kept."""
        return self._rate

    def lower_rate(self, rate: float) -> None:
        """Keep this share of the tokens from now on, also of those that were offered before; a higher one than now changes nothing."""
        if rate >= self._rate:
            return
        self._rate = rate
        kept = (self._key[: self._used] < rate).nonzero()[:, 0]
        self._used = len(kept)
        self._x[: self._used] = self._x[kept.to(self._x.device)]
        for values in (self._key, self._step, self._level):
            values[: self._used] = values[kept]


def seed_of(seed: int, name: str) -> int:
    """A seed for the input called ``name`` that does not depend on which other inputs are sampled in the same pass."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def capacity_within(channels: int, tokens_per_channel: float, element_size: int, memory: int) -> int:
    """Tokens to keep: ``tokens_per_channel`` times K and `MIN_TOKENS` at least, or what ``memory`` bytes hold if that is less."""
    return max(1, min(max(MIN_TOKENS, math.ceil(tokens_per_channel * channels)), memory // (channels * element_size)))
