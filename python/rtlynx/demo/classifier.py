"""`SceneClassifier`: a small CNN that reads a scene's attributes from its picture, to judge what the model draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from rtlynx.io import atomic_path

from .drawing import draw
from .scenes import ABSENT, COLOURS, POSITIONS, SHAPES, TEXTURES, Scenes, random_scenes

FILE_NAME = "classifier.safetensors"
_NOTHING = len(SHAPES)  # class of a position where no object is


@dataclass(frozen=True)
class Reading:
    """Logits for n pictures."""

    shape: torch.Tensor  # (n, 5 positions, 6 shapes + nothing)
    colour: torch.Tensor  # (n, 5 positions, 7 colours)
    texture: torch.Tensor  # (n, 4)
    ground: torch.Tensor  # (n, 7)


class SceneClassifier(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] to a `Reading`; 0.34 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_stage(3, 32, kernel=5, stride=2),
            *_stage(32, 64, stride=2),
            *_stage(64, 96, stride=2),
            *_stage(96, 128, stride=1),
            nn.Conv2d(128, 64, 1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.SiLU(),
        )
        self._sizes = (len(POSITIONS) * (len(SHAPES) + 1), len(POSITIONS) * len(COLOURS), len(TEXTURES), len(COLOURS))
        self.head = nn.Linear(128, sum(self._sizes))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(n, 128): what the last layer reads; the space in which Frechet distances between sets of pictures are taken."""
        features: torch.Tensor = self.trunk(pictures)
        return features

    def forward(self, pictures: torch.Tensor) -> Reading:
        shape, colour, texture, ground = self.head(self.features(pictures)).split(self._sizes, 1)
        return Reading(shape.unflatten(1, (len(POSITIONS), -1)), colour.unflatten(1, (len(POSITIONS), -1)), texture, ground)

    def save(self, path: Path) -> None:
        """Write the weights as bfloat16 safetensors, whole or not at all."""
        state = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(state, temporary)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> SceneClassifier:
        """A float32 classifier in evaluation mode from a file that `save` wrote."""
        classifier = cls()
        classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return classifier.to(device).eval()


def _stage(inputs: int, outputs: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.GroupNorm(8, outputs), nn.SiLU()]


def targets(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Per position (n, 5): the class of its shape (6: nothing there) and of its colour (`ABSENT` where nothing is)."""
    n = len(scenes)
    shape = torch.full((n, len(POSITIONS)), _NOTHING, device=scenes.device)
    colour = torch.full((n, len(POSITIONS)), ABSENT, device=scenes.device)
    for slot in range(scenes.shape.shape[1]):
        rows = scenes.present[:, slot].nonzero()[:, 0]
        shape[rows, scenes.position[rows, slot]] = scenes.shape[rows, slot]
        colour[rows, scenes.position[rows, slot]] = scenes.colour[rows, slot]
    return shape, colour


def loss(reading: Reading, scenes: Scenes) -> torch.Tensor:
    """Sum of the four cross-entropies; colours count only where an object is."""
    shape, colour = targets(scenes)
    return (
        F.cross_entropy(reading.shape.flatten(0, 1), shape.flatten())
        + F.cross_entropy(reading.colour.flatten(0, 1), colour.flatten(), ignore_index=ABSENT)
        + F.cross_entropy(reading.texture, scenes.texture)
        + F.cross_entropy(reading.ground, scenes.ground)
    )


def train_classifier(
    device: torch.device, seed: int, steps: int, batch: int = 512, on_step: Callable[[int, float], None] | None = None
) -> SceneClassifier:
    """Train on freshly drawn scenes, some blurred and noisy so that the classifier does not insist on spotless pictures.

    ``on_step(step, loss)`` is called every 50 steps and after the last.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SceneClassifier().to(device)
    generator = torch.Generator(device).manual_seed(seed + 1)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        scenes = random_scenes(batch, generator)
        error = loss(classifier(_worn(draw(scenes, generator), generator)), scenes)
        optimiser.zero_grad(set_to_none=True)
        error.backward()
        optimiser.step()
        schedule.step()
        if on_step is not None and (step % 50 == 49 or step == steps - 1):
            on_step(step + 1, error.item())
    return classifier.eval()


def _worn(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A quarter of the pictures blurred, and each with noise of a random strength up to 0.15."""
    n, device = len(pictures), pictures.device
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(n, 1, 1, 1, generator=generator, device=device) < 0.25
    strength = 0.15 * torch.rand(n, 1, 1, 1, generator=generator, device=device)
    return torch.where(chosen, blurred, pictures) + strength * torch.randn(pictures.shape, generator=generator, device=device)
