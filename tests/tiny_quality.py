"""`rtlynx bench quality` of the tiny pipeline, as small as it can be."""

from __future__ import annotations

from rtlynx.bench.quality.run import QualityBench, Settings
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS
from tiny_pipeline import tiny_pipeline

SETTINGS = Settings(prompts=3, steps=3, batch=2, calibration_prompts=2, calibration_steps=2)


def tiny_bench() -> QualityBench:
    """A new one every time."""
    return QualityBench(tiny_pipeline(), SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), SETTINGS, progress=False)
