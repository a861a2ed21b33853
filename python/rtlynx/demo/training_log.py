"""What a training run leaves behind besides weights: settings, loss curve and evaluations as JSON, CSV and, if possible, a plot."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtlynx.io import atomic_path

_LOG = logging.getLogger("rtlynx.demo.train")


@dataclass
class TrainingLog:
    settings: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)  # step, seconds, images, loss, learning_rate, images_per_second
    evaluations: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write training_log.json, loss_curve.csv and, where matplotlib is installed, loss_curve.png."""
        with atomic_path(folder / "training_log.json") as path:
            path.write_text(json.dumps({"settings": self.settings, "evaluations": self.evaluations, "curve": self.curve}, indent=1) + "\n")
        if not self.curve:
            return
        with atomic_path(folder / "loss_curve.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.curve[0]))
            writer.writeheader()
            writer.writerows(self.curve)
        self._plot(folder / "loss_curve.png")

    def _plot(self, target: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            _LOG.info("matplotlib is not installed: %s is not drawn", target.name)
            return
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["seconds"] for row in self.curve], [row["loss"] for row in self.curve], linewidth=1)
        axes.set(xlabel="seconds of training", ylabel="flow-matching loss (mean square)", yscale="log")
        axes.grid(alpha=0.3, which="both")
        with atomic_path(target) as path:
            figure.savefig(path, dpi=120)
