"""What the demo measures of one way of sampling: pictures, speed, and how far the model's velocity is from the dense model's."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.demo.pipeline import ScenesPipeline

PROBED_STEPS = 5
"""At how many steps, evenly spread from the first to the last, velocities are compared."""


@dataclass(frozen=True)
class Samples:
    """Pictures and the time they took.

    Attributes:
        pictures: ``(n, 3, 64, 64)`` float32 in [-1, 1], on the CPU.
        step_ms: Median wall time of a denoising step of one batch, the first step (warm-up) not counted; None with one step.
    """

    pictures: Tensor
    step_ms: float | None


def sample(pipe: ScenesPipeline, prompts: Sequence[str], *, steps: int, seed: int, batch: int) -> Samples:
    """Sample one picture per prompt. Picture i starts from noise that depends on ``seed`` and i alone, drawn on the CPU."""
    pictures, durations = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        clock = _StepClock(pipe.device)
        output: Any = pipe(part, num_inference_steps=steps, generator=noise, output_type="pt", callback_on_step_end=clock)
        pictures.append(output.images.float().cpu() * 2 - 1)
        if len(part) == min(batch, len(prompts)):  # a smaller last batch would not be comparable
            durations += clock.durations_ms
    return Samples(torch.cat(pictures), median(durations) if durations else None)


class _StepClock:
    """A ``callback_on_step_end`` that notes how long each step but the first took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.durations_ms: list[float] = []
        self._last: float | None = None

    def __call__(self, pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._last is not None:
            self.durations_ms.append((now - self._last) * 1e3)
        self._last = now
        return {}


class VelocityProbe:
    """Replays what the dense model saw on its own way from noise to picture, and compares velocities there.

    Compared on the dense trajectory, the error is the model's alone: it does not grow because an earlier step went elsewhere.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self._wanted = {round(i * (steps - 1) / max(1, PROBED_STEPS - 1)) for i in range(PROBED_STEPS)}
        self._steps = steps
        self._calls = 0
        self._seen: list[tuple[dict[str, Any], Tensor]] = []

    def __enter__(self) -> VelocityProbe:
        """Record while the dense model samples."""
        self._hook = self.model.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _record(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        if self._calls % self._steps in self._wanted:  # every batch of prompts counts its steps anew
            self._seen.append((inputs, output[0]))
        self._calls += 1

    @torch.no_grad()
    def error(self) -> float:
        """Relative L2 distance ``‖v - v_dense‖ / ‖v_dense‖`` over all probed steps and pictures together."""
        difference = reference = 0.0
        for inputs, dense in self._seen:
            velocity = self.model(**inputs)[0]
            difference += (velocity.float() - dense.float()).square().sum().item()
            reference += dense.float().square().sum().item()
        return math.sqrt(difference / reference)


def psnr_db(pictures: Tensor, reference: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio against the picture of the same prompt and noise, in dB.

    Args:
        pictures: ``(n, 3, h, w)`` in [-1, 1].
        reference: Likewise.
    """
    error = (pictures - reference).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())  # the range is 2, its square 4
