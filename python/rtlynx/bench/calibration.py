"""How long `rtlynx.calibrate` takes for a full-size model: of random weights, since what is fitted to changes no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import rtlynx
from rtlynx import SparsityConfig
from rtlynx.bench.models import BenchModel
from rtlynx.bench.random_model import build
from rtlynx.calibrate import calibrate
from rtlynx.eligibility import sparse_layers


@dataclass(frozen=True)
class CalibrationTimes:
    """One row of calibration.csv. Times are seconds.

    Attributes:
        layers: How many were solved for.
        prompts, steps: What the dense model ran on: so many samples, so many forwards of each.
        passes: How often it ran on all of that: more than once where samples of all inputs do not fit in memory.
        total_s: All of it.
        model_s: In the dense model, samples taken meanwhile.
        solving_s: The rest: solving, layer by layer, and setting what was found.
        peak_gb: The most that was allocated on the GPU at once, weights included, in 10⁹ bytes; 0 without one.
    """

    model: str
    height: int
    width: int
    method: str
    selection: str
    rank: int
    layers: int
    prompts: int
    steps: int
    passes: int
    total_s: float
    model_s: float
    solving_s: float
    peak_gb: float


@torch.no_grad()
def measure_calibration(
    model: BenchModel,
    device: torch.device,
    *,
    size: tuple[int, int] | None = None,
    method: str = "split",
    selection: Sequence[str] = ("shift",),
    rank: int = 64,
    prompts: int = 32,
    steps: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> CalibrationTimes:
    """Calibrate ``model`` with random weights on random inputs, once.

    Args:
        model: What to build.
        device: Where.
        size: Height and width; default: the model's.
        method, selection, rank: As of `rtlynx.calibrate`.
        prompts: Samples that the dense model runs on.
        steps: Forwards of each; the noise level, which changes no time, is the same in all.
        memory: Bytes for samples, as of `rtlynx.calibrate`.
        progress: Whether to show progress bars.
    """
    size = size or model.size
    torch.manual_seed(0)
    module = build(model, device)
    rtlynx.apply(module, SparsityConfig(rank=rank))
    runs = _Runs(module, model.inputs(size, device, torch.bfloat16, module.config), prompts, steps, progress)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    calibrate(module, run=runs, method=method, selection=tuple(selection), rank=rank, memory=memory, progress=progress)
    _synchronize(device)
    total = time.perf_counter() - start
    return CalibrationTimes(
        model=model.name,
        height=size[0],
        width=size[1],
        method=method,
        selection="+".join(selection) or "magnitude",
        rank=rank,
        layers=len(sparse_layers(module)),
        prompts=prompts,
        steps=steps,
        passes=runs.passes,
        total_s=total,
        model_s=runs.seconds,
        solving_s=total - runs.seconds,
        peak_gb=torch.cuda.max_memory_allocated(device) * 1e-9 if device.type == "cuda" else 0.0,
    )


class _Runs:
    """The dense model on all inputs, the same with every call, and the time that took."""

    def __init__(self, module: Callable[..., Any], inputs: dict[str, Any], prompts: int, steps: int, progress: bool) -> None:
        self.module, self.inputs, self.forwards, self.progress = module, inputs, prompts * steps, progress
        self.passes, self.seconds = 0, 0.0

    def __call__(self) -> None:
        self.passes += 1
        latents, first = next(iter(self.inputs.items()))
        device = (first[0] if isinstance(first, list) else first).device
        generator = torch.Generator(device).manual_seed(0)
        _synchronize(device)
        start = time.perf_counter()
        for _ in tqdm(range(self.forwards), desc="forwards", unit="forward", disable=not self.progress, leave=False):
            self.module(**{**self.inputs, latents: _drawn_like(first, generator)}, return_dict=False)
        _synchronize(device)
        self.seconds += time.perf_counter() - start


def _drawn_like(latents: Any, generator: torch.Generator) -> Any:
    """Other noise of the same shape; a list of it for a list."""
    if isinstance(latents, list):
        return [_drawn_like(each, generator) for each in latents]
    return torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
