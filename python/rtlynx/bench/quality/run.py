"""Measure every row on one trained model: the same prompts and noise, the same samples to fit from, the same judge."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rtlynx
from rtlynx.adaln_shift import install_adaln_shift
from rtlynx.bench.quality import longer
from rtlynx.bench.quality.judge import Judge, Verdict
from rtlynx.bench.quality.layer_time import layers_ms
from rtlynx.bench.quality.pruning import pruned_weights
from rtlynx.bench.quality.rows import Row
from rtlynx.bench.quality.searched import Found, Searcher
from rtlynx.bias_groups import install_bias_groups, of_many_steps
from rtlynx.calibrate.collect import Budget, LayerInput, all_dense, available_memory, collect
from rtlynx.calibrate.fit import Cache, Tensors, fit_input
from rtlynx.calibrate.runs import pipeline_runs
from rtlynx.config import SparsityConfig
from rtlynx.demo import captions
from rtlynx.demo.classifier import SceneClassifier
from rtlynx.demo.measure import sample
from rtlynx.demo.model import TOKENS, model_time
from rtlynx.demo.pipeline import ScenesPipeline
from rtlynx.demo.scenes import random_scenes
from rtlynx.dense_steps import install_dense_steps, is_dense
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.bootstrap import interval, interval_of, values_of
from rtlynx.evaluate.likeness import psnr_db
from rtlynx.evaluate.trajectory import Trajectory, VelocityErrors
from rtlynx.linear import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipes import find_recipe

_PROBE_EVERY = 4
"""Velocities are compared at every fourth step and the last."""
_FRECHET_RESAMPLES = 100
_HELD_OUT_TOKENS_PER_CHANNEL = 2


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        prompts: Held-out prompts that are sampled.
        steps: Sampling steps.
        batch: Pictures sampled at once.
        calibration_prompts: Other prompts, to fit on.
        calibration_steps: Sampling steps of those.
        seed: Of prompts, noise and sampled tokens.
        training_steps: Of the trained branch.
    """

    prompts: int = 256
    steps: int = 28
    batch: int = 256
    calibration_prompts: int = 64
    calibration_steps: int = 8
    seed: int = 0
    training_steps: int = 2000


class QualityBench:
    """One model, prepared once and then measured row by row. The first row must be the dense one."""

    def __init__(self, pipe: ScenesPipeline, classifier: SceneClassifier, settings: Settings, progress: bool = True) -> None:
        self.pipe, self.settings, self.progress = pipe, settings, progress
        generator = torch.Generator().manual_seed(10_007 + settings.seed)
        scenes = random_scenes(settings.prompts, generator)
        calibration = captions.caption(random_scenes(settings.calibration_prompts, generator))
        held_out = captions.caption(random_scenes(max(8, settings.calibration_prompts // 4), generator))
        self.prompts = captions.caption(scenes)
        self.judge = Judge(classifier, scenes)
        pipe.set_progress_bar_config(disable=True)
        rtlynx.apply(pipe, _config(Row("dense")))
        self.layers = sparse_layers(pipe.transformer)
        self._calibration_prompts, self._held_out_prompts = calibration, held_out
        self.inputs, self.held_out = self._samples()
        self._shifted: tuple[list[LayerInput], list[LayerInput]] | None = None  # the same without the shift of adaLN
        self._many_prompts = captions.caption(random_scenes(longer.PROMPTS * settings.calibration_prompts, generator))
        self._searchers: dict[str, Searcher] = {}  # by the precision of the products
        self._found: Found | None = None
        self._cache: Cache = {}
        self._cached: tuple[object, ...] = ()
        self._fitted: dict[tuple[object, ...], dict[str, Tensors]] = {}
        self._trajectory = Trajectory()
        self._pictures: Tensor | None = None
        self._verdict: Verdict | None = None
        self._dense_frechet: list[float] = []
        self._before: dict[SparseLinear, Tensor] = {}

    def measure(self, row: Row) -> dict[str, Any]:
        """Everything about one row, JSON-able."""
        started = time.perf_counter()
        with self._as(row):
            fitted, found = time.perf_counter() - started, self._found
            pictures = self._sample(row)
            errors = self._velocity(row)
            layer_error = self._layer_errors(row.adaln) if row.fit is not None or row.pruning is not None else {}
            ms, dense_ms = (self._layer_ms(row) if row.pruning is None and not row.other_precision else None) or (None, None)
        verdict = self.judge.look(pictures)
        frechet = values_of(lambda chosen: self.judge.frechet(verdict.features[chosen]), len(pictures), _FRECHET_RESAMPLES)
        if row.method == "dense":
            self._pictures, self._verdict, self._dense_frechet = pictures, verdict, frechet
        assert self._pictures is not None and self._verdict is not None, "the dense row comes first"
        psnr = None if row.method == "dense" else psnr_db(pictures, self._pictures).double()
        figures = {  # by prompts drawn
            "velocity_rel_err": None if errors is None else errors.relative,
            "psnr_db": None if psnr is None else lambda chosen: float(psnr[chosen].mean()),
            "attribute_accuracy": lambda chosen: float(verdict.right[chosen].sum() / verdict.asked[chosen].sum()),
        }
        values = {name: values_of(figure, len(pictures)) for name, figure in figures.items() if figure is not None}
        return {
            "method": row.method,
            "selection": row.selection,
            "rank": row.rank,
            **{name: interval_of(values[name]) if name in values else None for name in figures},
            "velocity_by_step": None if errors is None else dict(zip(errors.steps, errors.by_step(), strict=True)),
            "frechet": interval_of(frechet),
            "frechet_minus_dense": interval_of([own - dense for own, dense in zip(frechet, self._dense_frechet, strict=True)]),
            "attribute_accuracy_minus_dense": interval(self._accuracy_gained(verdict), len(pictures)),
            "replicates": {name: _replicates(each) for name, each in {**values, "frechet": frechet}.items()},
            "layer_ms": ms,
            "dense_layer_ms": dense_ms,
            "layer_rel_err": layer_error,
            "fit_seconds": round(fitted, 2),
            "seconds": round(time.perf_counter() - started, 2),
            **({} if found is None else {"search": found.about, "recipe": None if found.config is None else found.config.to_dict()}),
        }

    @property
    def pictures(self) -> Tensor | None:
        """The dense pictures, ``(n, 3, 64, 64)`` in 0..1."""
        return self._pictures

    # ---- the model, made as a row says ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _as(self, row: Row) -> Iterator[None]:
        skipped = find_recipe(self.pipe.transformer).paper_skip if row.skip else ()
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                layer.set_compensation()
                layer.configure(_config(row))
                layer.dense = row.fit is None or first_match(name, skipped) is not None
                if row.recipe is not None:
                    layer.dense = first_match(name, row.recipe.include or ()) is None
            self._found = None
            install_adaln_shift(self.pipe.transformer, row.adaln)
            stack.callback(install_adaln_shift, self.pipe.transformer, False)
            if row.search is not None:
                self._found = self._search(row)
                for unit, option in self._found.choice:
                    unit.choose(option)
            elif row.fit is not None:
                self._fit(row)
            install_dense_steps(self.pipe.transformer, _config(row))
            stack.callback(install_dense_steps, self.pipe.transformer, None)
            install_bias_groups(self.pipe.transformer)
            if row.pruning is not None:
                self._before = stack.enter_context(pruned_weights(self.inputs, row.pruning == "wanda"))
            if row.other_precision:
                stack.enter_context(self._other_precision())
            yield

    def _fit(self, row: Row) -> None:
        assert row.fit is not None
        fit = replace(row.fit, training_steps=self.settings.training_steps)
        if row.longer or (fit, row.score, row.adaln) not in self._fitted:
            key = (row.score, row.adaln, fit.selection, fit.norm_compensation, fit.bias)
            if key != self._cached:
                self._cache, self._cached = {}, key
            device = next(iter(self.layers.values())).weight.device
            if row.longer:
                inputs = self._inputs(self._many_prompts, longer.TOKENS_PER_CHANNEL, 3_000_003)
                self._compensate(longer.fit_longer(inputs, fit, device, self._errors_with))
                return
            found = (part for input in self._samples_of(row.adaln)[0] for part in fit_input(input, fit, device, self._cache))
            self._fitted[fit, row.score, row.adaln] = dict(found)  # rows that differ in what else is done share it
        self._compensate(self._fitted[fit, row.score, row.adaln])

    def _compensate(self, found: Mapping[str, Tensors]) -> None:
        for name, tensors in found.items():
            self.layers[name].set_compensation(**tensors)

    def _errors_with(self, found: Mapping[str, Tensors]) -> dict[str, float]:
        self._compensate(found)
        return self._layer_errors()

    def _search(self, row: Row) -> Found:
        assert row.fit is not None and row.search is not None
        if row.precision not in self._searchers:
            texts, settings, model = self._held_out_prompts, self.settings, self.pipe.transformer
            options = {"num_inference_steps": settings.calibration_steps}
            runs = pipeline_runs("bench quality", self.pipe, texts, None, settings.seed + 2_000_003, len(texts), options)
            scale = settings.batch / len(texts)
            config = replace(_config(row), rank=row.rank)
            self._searchers[row.precision] = Searcher(model, self.layers, self.inputs, row.fit, config, runs, scale, self.progress)
        return self._searchers[row.precision].find(row.search)

    @contextmanager
    def _other_precision(self) -> Iterator[None]:
        """Float32 instead of half precision, bfloat16 instead of float32."""
        original = self.pipe.transformer
        other = torch.bfloat16 if original.dtype is torch.float32 else torch.float32
        self.pipe.transformer = nn.Module.to(copy.deepcopy(original), dtype=other)  # ModelMixin.to warns about every cast
        try:
            yield
        finally:
            self.pipe.transformer = original

    # ---- what is measured ----------------------------------------------------------------------------------------------------------------

    def _sample(self, row: Row) -> Tensor:
        settings = self.settings
        steps = self._steps(row)
        seed = settings.seed + (500 if row.reseeded else 0)
        with ExitStack() as stack:
            if row.method == "dense":
                stack.enter_context(self._trajectory.recording(self.pipe.transformer, self._probed, steps))
            self.pipe.set_progress_bar_config(disable=True)
            pictures = sample(self.pipe, self.prompts, steps=steps, seed=seed, batch=settings.batch).pictures
        return (pictures / 2 + 0.5).clamp(0, 1)

    def _steps(self, row: Row) -> int:
        return max(1, round(self.settings.steps * row.steps))

    def _probed(self, step: int) -> bool:
        return step % _PROBE_EVERY == 0 or step == self.settings.steps - 1

    def _velocity(self, row: Row) -> VelocityErrors | None:
        if row.steps != 1 or row.reseeded:
            return None
        model = self.pipe.transformer
        return self._trajectory.errors(model, self._adapt(model.dtype) if row.other_precision else None)

    def _adapt(self, dtype: torch.dtype) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
        """The model's inputs in another dtype, on the same clock (see `model_time`)."""

        def adapt(step: int, inputs: dict[str, Any]) -> dict[str, Any]:
            sigma = torch.full_like(inputs["timestep"], 1 - step / self.settings.steps, dtype=torch.float32)
            cast = {key: inputs[key].to(dtype) for key in ("hidden_states", "encoder_hidden_states", "pooled_projections")}
            return {**inputs, **cast, "timestep": model_time(sigma, dtype)}

        return adapt

    def _layer_ms(self, row: Row) -> tuple[float, float] | None:
        """Of the layers in one step, and of the dense ones measured in turns with them.

        On average over the bench's steps: some are dense in some rows, and some are left out in others.
        """
        for layer in self.layers.values():
            layer.dense_step = False
        measured = layers_ms(self._samples_of(row.adaln)[0], self.settings.batch * TOKENS, self.settings.batch)
        if measured is None:
            return None
        sparse, dense = measured
        steps = self.settings.steps
        share = sum(is_dense(1 - step / steps, row.dense_first, row.dense_last) for step in range(steps)) / steps
        return (share * dense + (1 - share) * sparse) * self._steps(row) / steps, dense

    def _layer_errors(self, adaln: bool = False) -> dict[str, float]:
        """Relative output error of every layer on held-out tokens of the dense model; NaN-free, layers left dense are 0.

        Of layers that are dense on some steps it is that of the others.
        """
        found = {}
        for layer in self.layers.values():
            layer.dense_step = False
        with torch.no_grad():
            for input, read in zip(self._samples_of(adaln)[1], self.held_out, strict=True):
                for name, layer in input.layers.items():
                    weight = self._before.get(layer, layer.weight)
                    want, whole = (nn.functional.linear(each.samples.x, weight, layer.bias).float() for each in (input, read))
                    got = of_many_steps(layer, input.samples.x, input.samples.level).float()
                    found[name] = float((got - want).norm() / whole.norm())  # of the output, what adaLN's shift gives it included
        return found

    def _accuracy_gained(self, verdict: Verdict) -> Callable[[Tensor], float]:
        """Over the dense model, by prompts drawn."""
        assert self._verdict is not None
        gained = verdict.right - self._verdict.right
        return lambda chosen: float(gained[chosen].sum() / verdict.asked[chosen].sum())

    def _samples(self) -> tuple[list[LayerInput], list[LayerInput]]:
        """To fit from, and held out."""
        return self._gather(self._calibration_prompts, 4, 0), self._gather(self._held_out_prompts, _HELD_OUT_TOKENS_PER_CHANNEL, 1_000_003)

    def _samples_of(self, adaln: bool) -> tuple[list[LayerInput], list[LayerInput]]:
        if not adaln:
            return self.inputs, self.held_out
        if self._shifted is None:  # the model has the hooks now
            self._shifted = self._samples()
        return self._shifted

    def _gather(self, prompts: list[str], tokens_per_channel: float, seed: int) -> list[LayerInput]:
        return list(self._inputs(prompts, tokens_per_channel, seed))

    def _inputs(self, prompts: list[str], tokens_per_channel: float, seed: int) -> Iterator[LayerInput]:
        settings, device = self.settings, next(iter(self.layers.values())).weight.device
        options = {"num_inference_steps": settings.calibration_steps}
        runs = pipeline_runs("bench quality", self.pipe, prompts, None, settings.seed + seed, 8, options)
        budget = Budget(tokens_per_channel, available_memory(device), device)
        with all_dense(self.layers), tqdm(total=len(runs), desc="dense runs", unit="run", disable=not self.progress, leave=False) as bar:
            yield from collect(self.layers, runs, budget, seed=settings.seed + seed, bar=bar, timed=[self.pipe.transformer])


def _replicates(values: list[float]) -> list[float]:
    """A figure and its first resamples, which are the same prompts in all rows: what differences between two rows are made of."""
    return [float(f"{value:.6g}") for value in values[: 1 + _FRECHET_RESAMPLES]]


def _config(row: Row) -> SparsityConfig:
    if row.fit is None:
        return SparsityConfig(rank=0, small_m="sparse")
    return SparsityConfig(
        branch=row.fit.rule.branch,
        norm_compensation=row.fit.norm_compensation,
        dense_first=row.dense_first,
        dense_last=row.dense_last,
        precision=row.precision,
        selection=row.score,
        small_m="sparse",
    )
