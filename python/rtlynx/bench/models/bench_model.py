"""`BenchModel`: a model to time one denoising step of, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Size = tuple[int, int]
"""Height and width of the picture in pixels."""


@dataclass(frozen=True)
class BenchModel:
    """One released architecture and what its pipeline feeds it.

    Attributes:
        name: What the command line and the results call it.
        cls: Its class in diffusers.
        inputs: Random keyword arguments of one forward: ``inputs(size, device, dtype, config)`` with the model's own ``config``.
        config: Where the released model differs from the defaults of the class.
        size: Height and width unless asked for others.
    """

    name: str
    cls: str
    inputs: Callable[[Size, torch.device, torch.dtype, Any], dict[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    size: Size = (1024, 1024)
