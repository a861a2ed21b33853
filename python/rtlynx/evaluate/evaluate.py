"""`evaluate`: what making a pipeline sparse changes, against the same pipeline dense."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rtlynx.calibrate.runs import quiet
from rtlynx.compacted import refuse_compact
from rtlynx.eligibility import sparse_layers, target_module, target_modules
from rtlynx.errors import InvalidArgumentError
from rtlynx.evaluate.bootstrap import Interval, interval, mean_interval_over_prompts
from rtlynx.evaluate.layers import layer_errors
from rtlynx.evaluate.learned import LEARNED, learned
from rtlynx.evaluate.likeness import psnr_db, ssim
from rtlynx.evaluate.sampling import Sampled, dense, sample
from rtlynx.evaluate.trajectory import Trajectory, VelocityErrors

_PROBED = 8
"""About so many calls of a run are compared, evenly spread."""


@dataclass(frozen=True)
class Way:
    """One way of sampling, compared with the dense model at the same seeds.

    Attributes:
        name: ``"dense"``, ``"sparse"``, ``"dense in float32"``, ``"dense, 24 of 28 steps"``.
        pictures: ``(n, c, h, w)`` in 0..1.
        seconds: Sampling time of all of them.
        velocity: ``‖v - v_dense‖ / ‖v_dense‖`` at what the dense model saw on its way; None where the steps are others.
        velocity_by_step: The same by step.
        psnr_db: Against the dense picture of the same prompt and noise; None for the dense way.
        ssim: Likewise.
        learned: Further figures by name (`rtlynx.evaluate.learned`): a float is one without interval, None one that could not be had.
    """

    name: str
    pictures: Tensor
    seconds: float
    velocity: Interval | None = None
    velocity_by_step: dict[int, float] = field(default_factory=dict)
    psnr_db: Interval | None = None
    ssim: Interval | None = None
    learned: dict[str, Interval | float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        prompts: What was sampled.
        steps: Sampling steps.
        ways: The dense way first.
        layer_errors: Layer → relative error of its output on the dense model's activations.
    """

    prompts: tuple[str, ...]
    steps: int
    ways: tuple[Way, ...]
    layer_errors: dict[str, float]


def evaluate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int = 28,
    seed: int = 0,
    batch_size: int = 1,
    noise_floor: bool = True,
    fewer_steps: int | None = None,
    metrics: Sequence[str] = (),
    progress: bool = True,
    **pipe_kwargs: Any,
) -> Evaluation:
    """Sample prompts dense and sparse at the same seeds and compare.

    Args:
        pipe: A pipeline whose model has sparse layers.
        prompts: What to sample; intervals are over them.
        steps: Sampling steps.
        seed: Of the noise.
        batch_size: Prompts per run.
        noise_floor: Also sample the dense model in float32 (bfloat16, if it is in float32): the difference nobody can object to. Takes a
            copy of the model.
        fewer_steps: Also sample the dense model with so many steps, as the other way to save time; None: as many as take the time of the
            sparse model, if that is faster. 0: not at all.
        metrics: Further ones, of ``"lpips"``, ``"clip"``, ``"fid"`` (to the dense pictures), ``"image_reward"``, which need downloaded
            weights, and what else is in `rtlynx.evaluate.learned.LEARNED`. ``"fid"`` has no interval.
        progress: Whether to show a progress bar.
        **pipe_kwargs: For the pipeline, e.g. ``guidance_scale``.

    Raises:
        InvalidArgumentError: The model has no sparse layers, or compact ones (`rtlynx.compact`), or an argument does not fit.
    """
    model = target_module(pipe, "evaluate")
    if sum(bool(sparse_layers(module)) for module in target_modules(pipe, "evaluate").values()) > 1:
        raise InvalidArgumentError("evaluate", "pipe", "a pipeline with two sparse transformers", "one sparse transformer at a time")
    if not sparse_layers(model):
        raise InvalidArgumentError("evaluate", "pipe", "a pipeline without sparse layers", "one given to rtlynx.apply")
    refuse_compact("evaluate", sparse_layers(model), "their weights, for the dense model to compare with: evaluate before rtlynx.compact")
    if not prompts or isinstance(prompts, str):
        raise InvalidArgumentError("evaluate", "prompts", repr(prompts), "a list of at least one")
    unknown = sorted(set(metrics) - set(LEARNED))
    if unknown:
        raise InvalidArgumentError("evaluate", "metrics", ", ".join(unknown), f"some of {', '.join(LEARNED)}")
    batches = [len(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    comparison = _Comparison(pipe, model, tuple(prompts), steps, tuple(metrics))
    with (
        quiet(pipe),
        tqdm(total=len(batches) * (2 + noise_floor + (fewer_steps != 0)), desc="evaluate", unit="run", disable=not progress) as bar,
    ):

        def done() -> None:
            bar.update()
            comparison.trajectory.begin_run()

        def run(steps: int) -> Sampled:
            return sample(pipe, prompts, steps=steps, seed=seed, batch_size=batch_size, on_batch=done, **pipe_kwargs)

        every = max(1, steps // _PROBED)
        with dense(model), comparison.trajectory.recording(model, lambda call: call % every == 0):
            baseline = run(steps)
        errors = functools.partial(comparison.trajectory.errors, batches=batches, pictures=len(baseline.pictures) // len(prompts))
        ways = [Way("dense", baseline.pictures, baseline.seconds)]
        sparse = run(steps)
        ways.append(comparison.way("sparse", sparse, baseline, errors(model)))
        if noise_floor:
            with dense(model), _other_precision(pipe, model) as other:
                name = str(next(other.parameters()).dtype).removeprefix("torch.")
                ways.append(comparison.way(f"dense in {name}", run(steps), baseline, errors(other, _caster(other))))
        if fewer_steps is None:
            fewer_steps = round(steps * sparse.seconds / baseline.seconds)
        if 0 < fewer_steps < steps:
            with dense(model):
                ways.append(comparison.way(f"dense, {fewer_steps} of {steps} steps", run(fewer_steps), baseline, None))
        by_layer = layer_errors(pipe, model, prompts[: max(1, min(8, len(prompts)))], steps=min(steps, 4), seed=seed, **pipe_kwargs)
    return Evaluation(tuple(prompts), steps, tuple(ways), by_layer)


@dataclass
class _Comparison:
    pipe: Any
    model: nn.Module
    prompts: tuple[str, ...]
    steps: int
    metrics: tuple[str, ...]
    trajectory: Trajectory = field(default_factory=Trajectory)

    def way(self, name: str, sampled: Sampled, baseline: Sampled, errors: VelocityErrors | None) -> Way:
        found, reference, prompts = sampled.pictures, baseline.pictures, len(self.prompts)
        frames, other = (t.reshape(-1, *t.shape[-3:]) for t in (found, reference))
        return Way(
            name,
            found,
            sampled.seconds,
            None if errors is None else interval(errors.relative, prompts),
            {} if errors is None else dict(zip(errors.steps, errors.by_step(), strict=True)),
            mean_interval_over_prompts(psnr_db(found, reference), prompts),
            mean_interval_over_prompts(ssim(frames, other), prompts),
            {metric: learned(metric, frames, other, self.prompts) for metric in self.metrics},
        )


@contextmanager
def _other_precision(pipe: Any, model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model in float32 (in bfloat16, if it is in float32) takes its place in the pipeline inside the block."""
    to = torch.bfloat16 if next(model.parameters()).dtype is torch.float32 else torch.float32
    slot = next((name for name in ("transformer", "unet") if getattr(pipe, name, None) is not None), None)
    if slot is None:
        raise InvalidArgumentError("evaluate", "noise_floor", f"a {type(pipe).__name__} without transformer or unet", "noise_floor=False")
    original = getattr(pipe, slot)
    other = nn.Module.to(copy.deepcopy(model), dtype=to)  # ModelMixin.to warns about every cast
    setattr(pipe, slot, other)
    try:
        yield other
    finally:
        setattr(pipe, slot, original)


def _caster(model: nn.Module) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """Recorded inputs for a model of another dtype: what was in the recorded model's dtype, which its latents have, is cast."""
    to = next(model.parameters()).dtype

    def adapt(call: int, inputs: dict[str, Any]) -> dict[str, Any]:
        latents = inputs.get("hidden_states", inputs.get("x"))
        own = getattr(latents[0] if isinstance(latents, (list, tuple)) else latents, "dtype", None)

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(cast, value))
            return value.to(to) if isinstance(value, Tensor) and value.dtype is own else value

        return {key: cast(value) for key, value in inputs.items()}

    return adapt
