"""Bootstrap intervals: what a figure might have been with other prompts. Every method is resampled with the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 200
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float


def interval(statistic: Callable[[Tensor], float], samples: int, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The percentile interval of ``statistic`` over resampled prompts.

    Args:
        statistic: From indices of samples (with repeats) to the figure.
        samples: How many samples there are.
        resamples: How often to draw as many again.
        seed: The same seed draws the same resamples, so that intervals of differences between methods are paired.
    """
    return interval_of(values_of(statistic, samples, resamples, seed))


def values_of(statistic: Callable[[Tensor], float], samples: int, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """The figure of the samples as they are, then of every resample; arguments as in `interval`."""
    return [statistic(torch.arange(samples)), *(statistic(chosen) for chosen in resampled(samples, resamples, seed))]


def interval_of(values: Sequence[float]) -> Interval:
    """The interval of what `values_of` found, or of differences between two of them."""
    value, *drawn = values
    if not drawn:
        return Interval(value, value, value)
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(drawn, dtype=torch.float64), ends).tolist()
    return Interval(value, low, high)


def mean_interval(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of a mean over samples."""
    return interval(lambda chosen: float(values[chosen].double().mean()), len(values), resamples, seed)


def mean_interval_over_prompts(values: Tensor, prompts: int) -> Interval:
    """The interval of a mean over pictures, prompt by prompt equally many: the frames of a video are drawn together."""
    return mean_interval(values.double().unflatten(0, (prompts, -1)).mean(1))


def resampled(samples: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``samples`` draws with replacement, ``resamples`` times."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(samples, (samples,), generator=generator)
