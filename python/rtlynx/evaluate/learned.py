"""Metrics that need downloaded weights, of packages that not everybody has: used where the user has them, said to be missing where not.

`image_reward` is for environments with a transformers older than 4.56: its package, last released in 2023, does not import beside newer
ones, 5 among them. Put into `LEARNED`, any function of one's own is a metric like these.

What gives every picture a figure, `lpips`, `clip` and `image_reward`, has an interval over prompts. `fid` has none: a resample holds some
pictures several times, which moves a Fréchet distance up, so that the interval can lie wholly above the figure it is for.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from rtlynx.errors import InvalidArgumentError
from rtlynx.evaluate.bootstrap import Interval, mean_interval_over_prompts

logger = logging.getLogger("rtlynx")

CLIP = "openai/clip-vit-base-patch16"
"""Which CLIP: a name on the Hub, or a folder."""

_INSTALLED_BY = {"ImageReward": "image-reward", "clip": "git+https://github.com/openai/CLIP.git"}
"""Module → what pip installs it from. image-reward imports OpenAI's clip and does not bring it."""


def _lpips(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> Tensor:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    # One at a time: a call gives the mean of its pictures, and not every torchmetrics can be told to leave them single.
    return torch.stack([metric(*pair) for pair in zip(pictures.split(1), reference.split(1), strict=True)])


def _clip(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> Tensor:
    """CLIP score (Hessel et al. 2021): 100 times the cosine, at least 0. Not torchmetrics': with transformers 5 that ends with an error."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(CLIP).eval(), CLIPProcessor.from_pretrained(CLIP)
    texts = _texts(pictures, prompts)
    cosines = []
    for start in range(0, len(texts), 16):
        images = list((pictures[start : start + 16] * 255).round().byte())
        inputs = processor(text=texts[start : start + 16], images=images, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs)
        cosines.append((found.image_embeds * found.text_embeds).sum(-1))  # of length 1 each
    return 100 * torch.cat(cosines).clamp_min(0)


def _fid(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True)
    for part, other in zip(pictures.split(16), reference.split(16), strict=True):
        metric.update(other, real=True)
        metric.update(part, real=False)
    return float(metric.compute())


def _image_reward(pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> Tensor:
    """Xu et al. 2023: the reward of a picture for its prompt, of which 35 tokens are read. Higher is better; it can be negative."""
    level = logging.root.level
    try:
        with warnings.catch_warnings():  # importing it turns off all warnings, and sets the root logger to INFO
            import ImageReward
    except ModuleNotFoundError as error:
        source = _INSTALLED_BY.get(error.name or "")
        if source is None:
            raise
        raise ModuleNotFoundError(f"No module named {error.name!r}: pip install {source}", name=error.name) from error
    finally:
        logging.root.setLevel(level)
    model = ImageReward.load("ImageReward-v1.0", device=pictures.device)
    images = map(Image.fromarray, (pictures * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return torch.tensor([model.score(text, image) for text, image in zip(_texts(pictures, prompts), images, strict=True)])


def _texts(pictures: Tensor, prompts: Sequence[str]) -> list[str]:
    """The prompt of every picture: a video has several pictures."""
    return [prompt for prompt in prompts for _ in range(len(pictures) // len(prompts))]


LEARNED: dict[str, Callable[[Tensor, Tensor, Sequence[str]], Tensor | float]] = {
    "lpips": _lpips,
    "clip": _clip,
    "fid": _fid,
    "image_reward": _image_reward,
}
"""Name → from n pictures, the dense model's pictures and prompts to ``(n,)``, a figure for each, or to one figure for them all.

Pictures are ``(n, 3, h, w)`` in 0..1, of prompt after prompt equally many: the frames of its video. `fid` is to the dense pictures, not to
real ones.
"""


@torch.no_grad()
def learned(name: str, pictures: Tensor, reference: Tensor, prompts: Sequence[str]) -> Interval | float | None:
    """The mean over pictures with its interval over prompts, or a metric's one figure, without an interval.

    None, with a log record that says what is missing, where it cannot be had.
    """
    try:
        found = LEARNED[name](pictures, reference, prompts)
        if not isinstance(found, Tensor) or found.dim() == 0:
            return float(found)
        if found.shape != (len(pictures),):
            raise InvalidArgumentError("evaluate", name, tuple(found.shape), f"({len(pictures)},), one a picture, or a single figure")
        return mean_interval_over_prompts(found, len(prompts))
    except Exception as error:  # a missing package, missing weights, no network: the libraries have no common type for it
        first_line = str(error).strip().partition("\n")[0]
        logger.warning("evaluate: %s is not available here (%s: %s)", name, type(error).__name__, first_line)
        return None
