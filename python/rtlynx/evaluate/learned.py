"""Metrics that need downloaded weights, through torchmetrics: used where the user has them, said to be missing where not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("rtlynx")


def _lpips(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    for part, other in zip(pictures.split(16), reference.split(16), strict=True):
        metric.update(part, other)
    return float(metric.compute())


def _clip(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore("openai/clip-vit-base-patch16")
    for start in range(0, len(prompts), 16):
        metric.update([(picture * 255).byte() for picture in pictures[start : start + 16]], list(prompts[start : start + 16]))
    return float(metric.compute())


def _fid(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True)
    for part, other in zip(pictures.split(16), reference.split(16), strict=True):
        metric.update(other, real=True)
        metric.update(part, real=False)
    return float(metric.compute())


LEARNED: dict[str, Callable[[Tensor, Tensor, Sequence[str]], float]] = {"lpips": _lpips, "clip": _clip, "fid": _fid}
"""Name → from pictures, the dense model's pictures and prompts to a figure. `fid` is to the dense pictures, not to real ones."""


@torch.no_grad()
def learned(name: str, pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float | None:
    """The figure, or None, with a log record that says what is missing, where it cannot be had."""
    try:
        return LEARNED[name](pictures, reference, prompts)
    except Exception as error:  # a missing package, missing weights, no network: the libraries have no common type for it
        first_line = str(error).strip().partition("\n")[0]
        logger.warning("evaluate: %s is not available here (%s: %s)", name, type(error).__name__, first_line)
        return None
