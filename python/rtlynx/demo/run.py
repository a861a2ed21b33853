"""The demo itself: sample the same prompts from the same noise with every method, and measure each against the dense model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import rtlynx
from rtlynx.demo import captions
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.measure import VelocityProbe, psnr_db, sample
from rtlynx.demo.methods import Method, methods
from rtlynx.demo.metrics import score_pictures
from rtlynx.demo.model import TOKENS
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline
from rtlynx.demo.place import Place, choose_place
from rtlynx.demo.scenes import Scenes, random_scenes
from rtlynx.errors import InvalidArgumentError

MOST_PROMPTS = 1024
CALIBRATION_STEPS = 8
CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """What the user may choose; the command line explains each."""

    device: str = "auto"
    prompts: int | None = None
    steps: int = 16
    rank: int = 16
    seed: int = 0
    model: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """One method's pictures and measurements; see `rtlynx.demo.show.COLUMNS` for their meaning."""

    method: Method
    pictures: Tensor
    velocity_rel_err: float
    psnr_db: float | None
    attribute_accuracy: float
    step_ms: float | None
    sparse_flops_share: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo shows."""

    settings: Settings
    place: Place
    kernels: tuple[str, ...]
    prompts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    parameters: int
    seconds: float


def run_demo(settings: Settings, *, progress: bool = True) -> DemoResult:
    """Run all methods.

    Raises:
        InvalidArgumentError: A setting is out of range, or the model's folder is not one.
        DeviceError: A GPU was asked for on which the kernels cannot run.
    """
    started = time.monotonic()
    place = choose_place(settings.device)
    settings = replace(settings, prompts=_prompt_count(settings.prompts, place), model=settings.model or DEFAULT_WEIGHTS)
    pipe, classifier = _load(settings, place)
    scenes, calibration = _scenes(settings, place)
    comparison = _Comparison(settings, place, pipe, classifier, scenes, captions.caption(calibration), progress)
    outcomes = []
    for number, method in enumerate(rows := methods(settings.rank), start=1):
        if progress:
            tqdm.write(f"{number}/{len(rows)} {method.title}", file=sys.stderr)
        outcomes.append(comparison.run(method))
    return DemoResult(
        settings=settings,
        place=place,
        kernels=tuple(sorted(comparison.kernels)),
        prompts=comparison.prompts,
        outcomes=tuple(outcomes),
        parameters=sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        seconds=time.monotonic() - started,
    )


class _Comparison:
    """Runs one method after the other on the same pipeline; the first must be the dense one, which the others are compared with."""

    def __init__(
        self,
        settings: Settings,
        place: Place,
        pipe: ScenesPipeline,
        classifier: SceneClassifier,
        scenes: Scenes,
        calibration: list[str],
        progress: bool,
    ) -> None:
        self.settings, self.place, self.pipe, self.classifier, self.scenes = settings, place, pipe, classifier, scenes
        self.calibration, self.progress = calibration, progress
        self.prompts = tuple(captions.caption(scenes))
        self.kernels: set[str] = set()
        self._probe = VelocityProbe(pipe.transformer, settings.steps)
        self._dense: Tensor | None = None
        self._fitted: dict[str, rtlynx.Compensation] = {}

    def run(self, method: Method) -> Outcome:
        if method.config is None:
            return self._run_dense(method)
        rtlynx.apply(self.pipe, method.config)
        try:
            return self._run_sparse(method)
        finally:
            rtlynx.remove(self.pipe)

    def _run_dense(self, method: Method) -> Outcome:
        with self._probe:
            pictures, step_ms = self._sample()
        self._dense = pictures
        return Outcome(method, pictures, 0.0, None, self._accuracy(pictures), step_ms, 0.0)

    def _run_sparse(self, method: Method) -> Outcome:
        assert self._dense is not None, "the dense method comes first"
        if method.calibration is not None:
            self._compensate(method.calibration)
        summary = rtlynx.summary(self.pipe, tokens=self.place.batch * TOKENS)
        self.kernels |= {row.kernel for row in summary if row.sparse and row.kernel}
        error = self._probe.error()
        pictures, step_ms = self._sample()
        psnr = psnr_db(pictures, self._dense)
        return Outcome(method, pictures, error, psnr, self._accuracy(pictures), step_ms, summary.sparse_flops_share)

    def _compensate(self, form: Literal["paper", "split"]) -> None:
        """Fit the branches, or take those that an earlier method with the same arithmetic and at least the same layers had fitted."""
        if form in self._fitted:
            self._fitted[form].apply_to(self.pipe)
            return
        self._fitted[form] = rtlynx.calibrate(
            self.pipe,
            self.calibration,
            method=form,
            rank=self.settings.rank,
            selection=(),  # as the paper selects, so that forms alone are compared
            seed=self.settings.seed,
            progress=self.progress,
            batch_size=CALIBRATION_BATCH,
            num_inference_steps=CALIBRATION_STEPS,
        )

    def _sample(self) -> tuple[Tensor, float | None]:
        self.pipe.set_progress_bar_config(desc="sampling", leave=False, disable=not self.progress)
        samples = sample(self.pipe, self.prompts, steps=self.settings.steps, seed=self.settings.seed, batch=self.place.batch)
        return samples.pictures, samples.step_ms

    def _accuracy(self, pictures: Tensor) -> float:
        return score_pictures(self.classifier, pictures, self.scenes).mean


def _prompt_count(wanted: int | None, place: Place) -> int:
    count = place.prompts if wanted is None else wanted
    if not 1 <= count <= MOST_PROMPTS:
        raise InvalidArgumentError("demo", "prompts", count, f"1 to {MOST_PROMPTS}")
    return count


def _load(settings: Settings, place: Place) -> tuple[ScenesPipeline, SceneClassifier]:
    folder = settings.model
    assert folder is not None
    for name in ("model_index.json", FILE_NAME):
        if not (folder / name).is_file():
            raise InvalidArgumentError("demo", "model", f"{folder} without {name}", "a folder that rtlynx.demo.train wrote")
    pipe = ScenesPipeline.from_pretrained(folder).to(place.device, place.dtype)
    return pipe, SceneClassifier.load(folder / FILE_NAME)


def _scenes(settings: Settings, place: Place) -> tuple[Scenes, Scenes]:
    """Scenes to sample and scenes to calibrate on: never the same, and the first n whatever n is."""
    generator = torch.Generator().manual_seed(settings.seed)
    pool = random_scenes(MOST_PROMPTS + place.calibration_prompts, generator)
    return pool[: settings.prompts], pool[MOST_PROMPTS:]
