"""How like two sets of pictures are, picture by picture."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx.errors import InvalidArgumentError


def psnr_db(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every picture, in dB; infinite for an identical one. Pictures ``(n, c, h, w)`` in 0..1."""
    return -10 * (pictures.double() - reference.double()).square().flatten(1).mean(1).log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of every picture, at most 1. Needs torchmetrics.

    Raises:
        InvalidArgumentError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as similarity
    except ImportError as error:
        raise InvalidArgumentError("evaluate", "ssim", "no torchmetrics", "it installed: pip install 'rtlynx[eval]'") from error
    parts = [
        similarity(part.float(), other.float(), data_range=1.0, reduction="none")
        for part, other in zip(pictures.split(64), reference.split(64), strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])  # type: ignore[union-attr]
