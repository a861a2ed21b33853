"""Run a pipeline on prompts at fixed seeds and get pictures as one tensor, with the time it took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.eligibility import sparse_layers
from rtlynx.errors import InvalidArgumentError


@dataclass(frozen=True)
class Sampled:
    """Pictures of a set of prompts.

    Attributes:
        pictures: ``(n, c, h, w)`` or, of videos, ``(n, f, c, h, w)``, float32 in 0..1, on the CPU.
        seconds: Of the pipeline, the first batch left out where there are more: it warms up.
    """

    pictures: Tensor
    seconds: float


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], object] = lambda: None,
    **pipe_kwargs: Any,
) -> Sampled:
    """One picture per prompt; picture i starts from noise that depends on ``seed`` and i alone."""
    if "output_type" not in inspect.signature(pipe.__call__).parameters:
        raise InvalidArgumentError("evaluate", "pipe", f"a {type(pipe).__name__} without output_type", "a pipeline that can give tensors")
    pictures, seconds = [], []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        begun = time.perf_counter()
        output = pipe(prompt=part, num_inference_steps=steps, generator=noise, **{"output_type": "pt", **pipe_kwargs})
        pictures.append(_as_tensor(output).float().cpu())  # waits for the device
        seconds.append(time.perf_counter() - begun)
        on_batch()
    counted = seconds[1:] or seconds
    return Sampled(torch.cat(pictures).clamp(0, 1), sum(counted) / len(counted) * len(seconds))


def _as_tensor(output: Any) -> Tensor:
    value = getattr(output, "images", getattr(output, "frames", None))
    value = output[0] if value is None else value
    return value if isinstance(value, Tensor) else torch.stack([torch.as_tensor(each) for each in value])


@contextmanager
def dense(model: nn.Module) -> Any:
    """Inside the block all sparse layers compute densely; afterwards as before."""
    layers = sparse_layers(model).values()
    before = [layer.dense for layer in layers]
    try:
        for layer in layers:
            layer.dense = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.dense = was
