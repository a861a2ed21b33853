"""Metrics that need downloaded weights, through torchmetrics and transformers: used where the user has them, said to be missing where not.

ImageReward is not among them: its package, last released in 2023, does not import beside transformers 5. Put into `LEARNED`, it is a metric
like the others, and so is any function of one's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("rtlynx")

CLIP = "openai/clip-vit-base-patch16"
"""Which CLIP: a name on the Hub, or a folder."""


def _lpips(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    for part, other in zip(pictures.split(16), reference.split(16), strict=True):
        metric.update(part, other)
    return float(metric.compute())


def _clip(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    """CLIP score: 100 times the mean cosine. Not torchmetrics': with transformers 5 that ends with an error."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    texts = [prompt for prompt in prompts for _ in range(len(pictures) // len(prompts))]  # a video has several pictures
    cosines = []
    for start in range(0, len(texts), 16):
        images = list((pictures[start : start + 16] * 255).round().byte())
        inputs = processor(text=texts[start : start + 16], images=images, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs)
        cosines.append((found.image_embeds * found.text_embeds).sum(-1))  # of length 1 each
    return max(0.0, 100 * float(torch.cat(cosines).mean()))


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
