"""Train the demo's model and its judge from nothing, within a budget of wall-clock time::

    python -m rtlynx.demo.train --out runs/scenes --minutes 8.5 --seed 0

An interrupted run goes on with ``--resume`` and the same arguments; the budget counts over both. See docs/demo-model.md.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from tqdm import tqdm

from rtlynx.errors import InvalidArgumentError
from rtlynx.io import atomic_path

from . import classifier as judging
from .captions import caption
from .evaluation import FINAL_SETTINGS, Setting, evaluate, evaluate_classifier, held_out_scenes, pipeline_of, sample
from .files import whole_folder
from .flow import FlowTrainer
from .images import contact_sheet
from .model import PRESETS, Preset
from .pipeline import DEFAULT_WEIGHTS, ScenesPipeline
from .training_log import TrainingLog

_LOG = logging.getLogger("rtlynx.demo.train")

_CHECKPOINT = "checkpoint.pt"
_LOG_EVERY = 50  # steps


class TrainingRun:
    """One training run in one folder; every step of it can be resumed from the last checkpoint."""

    def __init__(self, out: Path, preset: Preset, device: torch.device, seed: int, minutes: float, steps: int | None) -> None:
        self.out, self.preset, self.device, self.seed = out, preset, device, seed
        self.budget = minutes * 60
        self.max_steps = steps
        self.reserve = min(40.0, 0.08 * self.budget)  # seconds kept back for saving and evaluating
        self.spent = 0.0  # seconds of the budget that earlier, interrupted runs used
        self.training_seconds = 0.0
        self.start = time.monotonic()
        self.log = TrainingLog()
        self.trainer = FlowTrainer(preset, device, seed)

    @property
    def elapsed(self) -> float:
        """Seconds of the budget used up to now."""
        return self.spent + time.monotonic() - self.start

    def resume(self) -> None:
        checkpoint = self.out / _CHECKPOINT
        if not checkpoint.is_file():
            raise InvalidArgumentError("train", "--resume", f"no {checkpoint}", "a folder in which a run wrote a checkpoint")
        state: dict[str, Any] = torch.load(checkpoint, map_location=self.device, weights_only=True)
        if state["preset"] != asdict(self.preset) or state["seed"] != self.seed:
            raise InvalidArgumentError(
                "train", "--resume", f"a run of {state['preset']}, seed {state['seed']}", f"{asdict(self.preset)}, seed {self.seed}"
            )
        self.trainer.load_state_dict(state["trainer"])
        self.spent, self.training_seconds = state["spent"], state["training_seconds"]
        self.log = TrainingLog(**state["log"])
        _LOG.info("resuming at step %d, %.0f s into the budget", self.trainer.step, self.spent)

    def save(self, classifier: judging.SceneClassifier) -> None:
        """Checkpoint, pipeline folder (average weights, bfloat16, with the classifier) and log, each whole or not at all."""
        with atomic_path(self.out / _CHECKPOINT) as path:
            torch.save(
                {
                    "trainer": self.trainer.state_dict(),
                    "preset": asdict(self.preset),
                    "seed": self.seed,
                    "spent": self.elapsed,
                    "training_seconds": self.training_seconds,
                    "log": asdict(self.log),
                },
                path,
            )
        with whole_folder(self.out / "pipeline") as folder:
            pipeline_of(self.trainer.average, torch.bfloat16).save_pretrained(folder)
            classifier.save(folder / judging.FILE_NAME)
        self.log.save(self.out)

    def get_classifier(self, steps: int, given: Path | None = None) -> judging.SceneClassifier:
        """The run's classifier: the one it was given, the one it trained before it was interrupted, or a new one."""
        if given is not None:
            self.log.settings["classifier"] = given.name
            return judging.SceneClassifier.load(given, self.device)
        saved = self.out / "pipeline" / judging.FILE_NAME
        if self.spent and saved.is_file():
            return judging.SceneClassifier.load(saved, self.device)
        begun = self.elapsed
        with tqdm(total=steps, desc="classifier", unit="step") as bar:

            def report(step: int, loss: float) -> None:
                bar.update(step - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")

            classifier = judging.train_classifier(self.device, self.seed, steps, on_step=report)
        self.log.settings["classifier_seconds"] = round(self.elapsed - begun, 1)
        return classifier

    def train(self, classifier: judging.SceneClassifier, save_every: float) -> None:
        """Step until the budget (less the reserve) or the number of steps is used up."""
        end = self.budget - self.reserve
        available = self.training_seconds + max(end - self.elapsed, 1e-6)  # of training, earlier runs' included
        before, start, saved = self.training_seconds, time.monotonic(), time.monotonic()
        window, window_start = torch.zeros((), device=self.device), time.monotonic()
        first = self.trainer.step
        with tqdm(total=round(available), initial=round(before), desc="training", unit="s") as bar:
            while self.elapsed < end and (self.max_steps is None or self.trainer.step < self.max_steps):
                self.training_seconds = before + time.monotonic() - start
                progress = self.training_seconds / available
                if self.max_steps is not None:
                    progress = max(progress, self.trainer.step / self.max_steps)
                window += self.trainer.train_step(progress)
                if self.trainer.step % _LOG_EVERY == 0:
                    loss = window.item() / _LOG_EVERY  # waits for the device, so the time read next is true
                    now = time.monotonic()
                    speed = min(self.trainer.step - first, _LOG_EVERY) * self.preset.batch / (now - window_start)
                    self._record(loss, progress, speed)
                    bar.set_postfix(step=self.trainer.step, loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
                    bar.update(round(self.training_seconds) - bar.n)
                    window.zero_()
                    window_start = now
                if time.monotonic() - saved > save_every:
                    self.save(classifier)
                    self.draw_samples()
                    saved = window_start = time.monotonic()

    def _record(self, loss: float, progress: float, speed: float) -> None:
        self.log.curve.append(
            {
                "step": self.trainer.step,
                "seconds": round(self.training_seconds, 2),
                "images": self.trainer.step * self.preset.batch,
                "loss": round(loss, 6),
                "learning_rate": self.trainer.learning_rate(progress),
                "images_per_second": round(speed, 1),
            }
        )

    def draw_samples(self, columns: int = 8, rows: int = 4) -> None:
        """Write the same held-out prompts, drawn by the average weights from the same noise, as samples/step-N.png."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        scenes = held_out_scenes(columns * rows, self.seed)
        pictures = sample(pipeline_of(self.trainer.average, dtype), scenes, Setting(dtype=dtype), self.seed)
        with atomic_path(self.out / "samples" / f"step-{self.trainer.step:06d}.png") as path:
            contact_sheet(pictures, columns).save(path)
        with atomic_path(self.out / "samples" / "prompts.txt") as path:
            path.write_text("\n".join(caption(scenes)) + "\n")

    def evaluate(self, classifier: judging.SceneClassifier, prompts: int) -> None:
        """Score the classifier on real pictures, and the weights as they were saved on held-out prompts."""
        results = self.log.evaluations
        results["classifier_on_real"] = evaluate_classifier(classifier, self.device, self.seed, 4 * prompts)
        _LOG.info("classifier on real pictures: %s", results["classifier_on_real"])
        shipped = ScenesPipeline.from_pretrained(self.out / "pipeline").to(self.device)
        results["samples"] = []
        for setting in FINAL_SETTINGS:
            result = evaluate(shipped.transformer, classifier, setting, self.seed, prompts)
            results["samples"].append(result)
            _LOG.info("samples: %s", result)
            self.log.save(self.out)


def run_training(
    out: Path,
    preset: Preset,
    minutes: float = 8.5,
    seed: int = 0,
    device: str | None = None,
    steps: int | None = None,
    resume: bool = False,
    compile_blocks: bool = True,
    classifier_steps: int = 3000,
    prompts: int = 1024,
    save_every: float = 60.0,
    classifier_file: Path | None = None,
) -> TrainingLog:
    """Train classifier and transformer into the folder ``out`` and return the log; the options are those of `main`."""
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN attention's backward crashed under torch.compile (torch 2.11)
        torch.set_float32_matmul_precision("high")
    run = TrainingRun(out, preset, target, seed, minutes, steps)
    if resume:
        run.resume()
    run.log.settings |= {
        "preset": asdict(preset),
        "parameters": sum(parameter.numel() for parameter in run.trainer.transformer.parameters()),
        "seed": seed,
        "minutes": minutes,
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else platform.processor() or "CPU",
        "torch": str(torch.__version__),  # a str subclass, which weights_only loading would refuse
        "diffusers": diffusers.__version__,
    }
    _LOG.info("%s", run.log.settings)
    classifier = run.get_classifier(classifier_steps, classifier_file)
    if compile_blocks and target.type == "cuda":
        begun = run.elapsed
        run.trainer.compile()
        _LOG.info("compiled in %.1f s", run.elapsed - begun)
    run.train(classifier, save_every)
    run.log.settings |= {"steps": run.trainer.step, "training_seconds": round(run.training_seconds, 1)}
    run.save(classifier)
    run.draw_samples()
    run.evaluate(classifier, prompts)
    run.log.settings["total_seconds"] = round(run.elapsed, 1)
    run.log.save(out)
    _LOG.info("done in %.0f s: %s", run.elapsed, out / "pipeline")
    return run.log


def _preset(name: str, width: int | None, double: int | None, single: int | None, batch: int | None, rate: float | None) -> Preset:
    if name not in PRESETS:
        raise InvalidArgumentError("train", "--preset", name, f"one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if width is not None:
        if width < 1 or width % preset.head_dim:
            raise InvalidArgumentError("train", "--width", width, f"a multiple of the head's width, {preset.head_dim}")
        preset = replace(preset, heads=width // preset.head_dim)
    given: dict[str, Any] = {"double": double, "single": single, "batch": batch, "learning_rate": rate}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pipeline, checkpoint, log and sample sheets.")],
    minutes: Annotated[float, typer.Option(help="Wall-clock budget for everything; resumed runs share it.")] = 8.5,
    seed: Annotated[int, typer.Option(help="Decides initial weights, data and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    preset: Annotated[str, typer.Option(help=f"Size of model: {', '.join(PRESETS)}.")] = "small",
    width: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    double: Annotated[int | None, typer.Option(help="Double-stream blocks instead of the preset's.")] = None,
    single: Annotated[int | None, typer.Option(help="Single-stream blocks instead of the preset's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures per step instead of the preset's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate instead of the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps, if the budget lasts.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile the blocks (CUDA only).")] = True,
    classifier_steps: Annotated[int, typer.Option(help="Training steps of the classifier.")] = 3000,
    prompts: Annotated[int, typer.Option(help="Held-out prompts of each evaluation.")] = 1024,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    shipped_classifier: Annotated[
        bool, typer.Option("--shipped-classifier", help="Judge by the classifier that ships with the package instead of training one.")
    ] = False,
) -> None:
    """Train the demo's text-to-image model and the classifier that judges it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = _preset(preset, width, double, single, batch, lr)
    given = DEFAULT_WEIGHTS / judging.FILE_NAME if shipped_classifier else None
    run_training(out, size, minutes, seed, device, steps, resume, compile_blocks, classifier_steps, prompts, save_every, given)


if __name__ == "__main__":
    typer.run(main)
