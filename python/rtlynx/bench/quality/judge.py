"""`Judge`: what a picture of the demo's world shows, picture by picture, and how far a set of them is from drawn ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtlynx.demo.classifier import Reading, SceneClassifier, targets
from rtlynx.demo.drawing import draw
from rtlynx.demo.scenes import ABSENT, Scenes, random_scenes

_REAL_PICTURES = 8192
_REAL_SEED = 77_000_001


@dataclass(frozen=True)
class Verdict:
    """Of n pictures.

    Attributes:
        right: ``(n,)``: how many asked attributes are there.
        asked: ``(n,)``: how many were asked: each object's shape and colour, the texture and its colour.
        features: ``(n, 128)`` float64.
    """

    right: Tensor
    asked: Tensor
    features: Tensor


class Judge:
    """The classifier, and the features of drawn pictures to compare with."""

    def __init__(self, classifier: SceneClassifier, scenes: Scenes) -> None:
        self.classifier, self.scenes = classifier, scenes
        device = next(classifier.parameters()).device
        # Drawn on the CPU, so that every machine compares with the same pictures.
        generator = torch.Generator().manual_seed(_REAL_SEED)
        real = torch.cat([draw(random_scenes(512, generator), generator) for _ in range(_REAL_PICTURES // 512)])
        features = torch.cat([self._features(part.to(device)) for part in real.split(256)])
        self._mean, covariance = features.mean(0), features.T.cov()
        self._trace, self._root = covariance.trace(), _root(covariance)

    def look(self, pictures: Tensor) -> Verdict:
        """Judge one picture per scene, ``(n, 3, 64, 64)`` in 0..1."""
        device = next(self.classifier.parameters()).device
        right, asked, features = [], [], []
        for start in range(0, len(pictures), 256):
            part = (pictures[start : start + 256] * 2 - 1).to(device)
            marks = _marks(self._read(part), self.scenes[slice(start, start + 256)].to(device))
            right.append(marks[0].cpu())
            asked.append(marks[1].cpu())
            features.append(self._features(part))
        return Verdict(torch.cat(right), torch.cat(asked), torch.cat(features))

    def frechet(self, features: Tensor) -> float:
        """Fréchet distance to drawn pictures, both modelled as Gaussians (Heusel et al., arXiv 1706.08500)."""
        mean, covariance = features.mean(0), features.T.cov()
        cross = torch.linalg.eigvalsh(self._root @ covariance @ self._root).clamp_min(0).sqrt().sum()
        return float((mean - self._mean).square().sum() + covariance.trace() + self._trace - 2 * cross)

    @torch.no_grad()
    def _read(self, pictures: Tensor) -> Reading:
        reading: Reading = self.classifier(pictures)
        return reading

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return self.classifier.features(pictures).double().cpu()


def _marks(reading: Reading, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Right and asked attributes of every picture."""
    shape, colour = targets(scenes)
    wanted = colour != ABSENT
    objects = ((reading.shape.argmax(2) == shape) & wanted).sum(1) + ((reading.colour.argmax(2) == colour) & wanted).sum(1)
    ground = (reading.texture.argmax(1) == scenes.texture).long() + (reading.ground.argmax(1) == scenes.ground)
    return objects + ground, 2 * wanted.sum(1) + 2


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root
