"""Does selection gain from the shift of adaLN? ``python -m rtlynx.bench.quality.sample_shift`` measures it on the demo's model.

`SparsityConfig(adaln_shift=True)`, a shift for every sample and step, against the Lloyd shift, which is one vector for all samples and
steps and costs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm

import rtlynx
from rtlynx.adaln_shift import adaln_layers
from rtlynx.calibrate.collect import Budget, all_dense, available_memory, collect
from rtlynx.calibrate.runs import pipeline_runs
from rtlynx.config import SparsityConfig
from rtlynx.demo.captions import caption
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.measure import VelocityProbe, psnr_db, sample
from rtlynx.demo.metrics import score_pictures
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline
from rtlynx.demo.scenes import random_scenes
from rtlynx.eligibility import sparse_layers
from rtlynx.report import Column, terminal_table


@dataclass(frozen=True)
class Shifted:
    """One row.

    Attributes:
        shift: ``"none"``, ``"lloyd"``, ``"adaLN"`` or ``"adaLN, lloyd"``.
        rank: Of split's branch; 0 without one.
        attention_rel_err: Mean over the projections of attention, on held-out tokens: RMS of the error over that of the output.
        mlp_rel_err: The same of the MLPs' up projections.
        velocity_rel_err: Of the model on the dense way from noise to picture.
        psnr_db: Against the dense pictures.
        attribute_accuracy: Share of the asked attributes that the classifier finds.
    """

    shift: str
    rank: int
    attention_rel_err: float
    mlp_rel_err: float
    velocity_rel_err: float
    psnr_db: float
    attribute_accuracy: float


@torch.no_grad()
def measure(
    pipe: ScenesPipeline, classifier: SceneClassifier, *, prompts: int, steps: int, ranks: Sequence[int], seed: int = 0
) -> list[Shifted]:
    """Every shift with selection alone and with split of some ranks, on a FLUX model of the demo's world.

    Args:
        pipe: The pipeline, dense; it is dense again afterwards.
        classifier: Judges the pictures.
        prompts: Sampled, and as many others to fit on.
        steps: Sampling steps, also of the calibration.
        ranks: Of the branch; 0: selection alone.
        seed: Of prompts and noise.
    """
    scenes = random_scenes(3 * prompts, torch.Generator().manual_seed(seed))
    asked, texts = scenes[:prompts], caption(scenes)
    model, found = pipe.transformer, []
    probe = VelocityProbe(model, steps)
    with probe:
        dense = sample(pipe, texts[:prompts], steps=steps, seed=seed, batch=prompts).pictures
    for adaln in (False, True):
        for lloyd in (False, True):
            for rank in ranks:
                method = "split" if rank else "plain"
                config = SparsityConfig(rank=rank, branch="dropped" if rank else "none", small_m="sparse", adaln_shift=adaln)
                rtlynx.apply(pipe, config)
                if rank or lloyd:
                    rtlynx.calibrate(
                        pipe,
                        texts[prompts : 2 * prompts],
                        method=method,
                        selection=("shift",) if lloyd else (),
                        seed=seed,
                        batch_size=8,
                        progress=False,
                        num_inference_steps=steps,
                    )
                error = probe.error()
                pictures = sample(pipe, texts[:prompts], steps=steps, seed=seed, batch=prompts).pictures
                layers = _layer_errors(pipe, texts[2 * prompts :], steps, seed)
                rtlynx.remove(pipe)
                name = ", ".join(["adaLN"] * adaln + ["lloyd"] * lloyd) or "none"
                accuracy = score_pictures(classifier, pictures, asked).mean
                found.append(Shifted(name, rank, *layers, error, psnr_db(pictures, dense), accuracy))
    return found


def _layer_errors(pipe: ScenesPipeline, prompts: list[str], steps: int, seed: int) -> tuple[float, float]:
    """Mean relative errors of the layers that adaLN feeds, whether or not their input is shifted by it: of attention, of MLPs."""
    layers, fed = sparse_layers(pipe.transformer), adaln_layers(pipe.transformer)
    power: dict[str, list[Tensor]] = {name: [] for name in fed}
    runs = pipeline_runs("bench", pipe, prompts, None, seed + 1, 8, {"num_inference_steps": steps})
    budget = Budget(1, available_memory(pipe.device), pipe.device)
    with ExitStack() as hooks, all_dense(layers):
        for name, layer in fed.items():  # after the hook that adds the shift back: outputs are the dense model's
            handle = layer.register_forward_hook(lambda m, args, y, name=name: power[name].append(y.float().square().mean()))
            hooks.callback(handle.remove)
        inputs = list(collect(fed, runs, budget, seed=seed, bar=tqdm(total=1, disable=True)))
    size = {name: torch.stack(squares).mean().sqrt() for name, squares in power.items()}
    attention: list[float] = []
    mlp: list[float] = []
    for input in inputs:
        x = input.samples.x
        for name, layer in input.layers.items():
            missing = (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).float()
            (attention if ".attn." in name else mlp).append(float(missing.square().mean().sqrt() / size[name]))
    return sum(attention) / len(attention), sum(mlp) / len(mlp)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 16])
    options = parser.parse_args()
    pipe = ScenesPipeline.from_pretrained(DEFAULT_WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    rows = measure(
        pipe, SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), prompts=options.prompts, steps=options.steps, ranks=options.ranks
    )
    columns = [Column("shift", "shift", "{}", numeric=False), Column("rank", "rank", "{}", numeric=True)]
    formats = {
        "attention_rel_err": "{:.2%}",
        "mlp_rel_err": "{:.2%}",
        "velocity_rel_err": "{:.2%}",
        "psnr_db": "{:.2f}",
        "attribute_accuracy": "{:.2%}",
    }
    columns += [Column(key, key.replace("_", " "), format, numeric=True) for key, format in formats.items()]
    Console(highlight=False).print(terminal_table(columns, [vars(row) for row in rows], title=f"{options.prompts} prompts"))


if __name__ == "__main__":
    main()
