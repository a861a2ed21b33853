"""Judging a trained pipeline: sample held-out prompts, read the attributes, compare with real pictures."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

from .captions import caption
from .classifier import SceneClassifier
from .drawing import draw
from .metrics import frechet_distance, score_pictures
from .model import unpack
from .pipeline import ScenesPipeline
from .scenes import Scenes, random_scenes

_HELD_OUT_SEED = 1_000_003  # added to the run's seed: evaluation never draws from the training's random numbers
_BATCH = 256


@dataclass(frozen=True)
class Setting:
    """How the pictures of one evaluation are sampled."""

    dtype: torch.dtype = torch.bfloat16
    steps: int = 20
    guidance: float = 1.0


FINAL_SETTINGS = (Setting(), Setting(dtype=torch.float32), Setting(steps=10), Setting(steps=40), Setting(guidance=2.0))


def pipeline_of(transformer: FluxTransformer2DModel, dtype: torch.dtype) -> ScenesPipeline:
    """A quiet pipeline around a copy of the transformer in another dtype."""
    copied = nn.Module.to(copy.deepcopy(transformer), dtype=dtype)  # ModelMixin.to warns about every cast
    pipeline = ScenesPipeline(copied, FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: ScenesPipeline, scenes: Scenes, setting: Setting, seed: int) -> torch.Tensor:
    """Pictures (n, 3, 64, 64) in [-1, 1] of the scenes' captions, on the pipeline's device."""
    prompts = caption(scenes)
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    parts: list[torch.Tensor] = [
        pipeline(
            prompts[start : start + _BATCH],
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance,
            generator=generator,
            output_type="latent",
            return_dict=False,
        )[0]
        for start in range(0, len(prompts), _BATCH)
    ]
    return unpack(torch.cat(parts))


def held_out_scenes(n: int, seed: int, device: torch.device | str = "cpu") -> Scenes:
    """The evaluation's scenes; drawn on the CPU, so that they are the same on every device."""
    return random_scenes(n, torch.Generator().manual_seed(_HELD_OUT_SEED + seed)).to(device)


def evaluate_classifier(classifier: SceneClassifier, device: torch.device, seed: int, n: int) -> dict[str, float]:
    """The classifier's accuracy on real held-out pictures: the ceiling of every score that it gives."""
    scenes = held_out_scenes(n, seed, device)
    real = draw(scenes, torch.Generator(device).manual_seed(_HELD_OUT_SEED + seed))
    return score_pictures(classifier, real, scenes).to_dict()


def evaluate(
    transformer: FluxTransformer2DModel, classifier: SceneClassifier, setting: Setting, seed: int, prompts: int
) -> dict[str, float | int | str]:
    """Attribute scores and Frechet distance of ``prompts`` samples, with the settings they were made with."""
    device = next(transformer.parameters()).device
    scenes = held_out_scenes(prompts, seed, device)
    start = time.perf_counter()
    pictures = sample(pipeline_of(transformer, setting.dtype), scenes, setting, seed)
    score = score_pictures(classifier, pictures, scenes).to_dict()
    seconds = time.perf_counter() - start
    real = draw(random_scenes(4 * prompts, torch.Generator(device).manual_seed(seed)), torch.Generator(device).manual_seed(seed + 1))
    return {
        "dtype": str(setting.dtype).removeprefix("torch."),
        "steps": setting.steps,
        "guidance": setting.guidance,
        "prompts": prompts,
        "seconds": round(seconds, 2),
        "frechet_distance": frechet_distance(classifier, pictures, real),
        **score,
    }
