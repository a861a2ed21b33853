"""Evaluation: a sparse model against the same model dense, at the same seeds, with intervals and a noise floor."""

from __future__ import annotations

from rtlynx.evaluate.evaluate import Evaluation, Way, evaluate
from rtlynx.evaluate.report import write_report

__all__ = ["Evaluation", "Way", "evaluate", "write_report"]
