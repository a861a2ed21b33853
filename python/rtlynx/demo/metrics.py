"""How good pictures are: are the asked attributes there, and how far is their distribution from real pictures'?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from .classifier import Reading, SceneClassifier, targets
from .scenes import ABSENT, Scenes


@dataclass(frozen=True)
class AttributeScore:
    """Shares in 0..1 over a set of pictures. "Asked" attributes are each object's shape and colour, the texture and its colour."""

    mean: float  # of all asked attributes
    all_right: float  # pictures with every asked attribute right and no object where none was asked
    shape: float
    colour: float
    texture: float
    ground: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def attribute_score(reading: Reading, scenes: Scenes) -> AttributeScore:
    """Compare what the classifier read with what the scenes ask for."""
    scenes = scenes.to(reading.shape.device)
    shape, colour = targets(scenes)
    asked = colour != ABSENT
    shape_right = reading.shape.argmax(2) == shape
    colour_right = reading.colour.argmax(2) == colour
    texture_right = reading.texture.argmax(1) == scenes.texture
    ground_right = reading.ground.argmax(1) == scenes.ground
    attributes = torch.cat([shape_right[asked], colour_right[asked], texture_right, ground_right])
    everything = shape_right.all(1) & (colour_right | ~asked).all(1) & texture_right & ground_right

    def share(right: torch.Tensor) -> float:
        return float(right.double().mean())

    return AttributeScore(
        mean=share(attributes),
        all_right=share(everything),
        shape=share(shape_right[asked]),
        colour=share(colour_right[asked]),
        texture=share(texture_right),
        ground=share(ground_right),
    )


@torch.no_grad()
def score_pictures(classifier: SceneClassifier, pictures: torch.Tensor, scenes: Scenes) -> AttributeScore:
    """`attribute_score` of pictures (n, 3, 64, 64) in [-1, 1]."""
    parts = [classifier(part) for part in _on_classifier(classifier, pictures)]
    fields = ((part.shape, part.colour, part.texture, part.ground) for part in parts)
    return attribute_score(Reading(*(torch.cat(tensors) for tensors in zip(*fields, strict=True))), scenes)


@torch.no_grad()
def frechet_distance(classifier: SceneClassifier, pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Frechet distance between two sets of pictures in the classifier's features, each modelled as a Gaussian.

    M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule...", https://arxiv.org/abs/1706.08500; other features, so
    the figures compare only with each other.
    """
    statistics = []
    for batch in (pictures, others):
        features = torch.cat([classifier.features(part) for part in _on_classifier(classifier, batch)]).double().cpu()
        statistics.append((features.mean(0), features.T.cov()))
    (mean, covariance), (other_mean, other_covariance) = statistics
    root = _root(covariance)
    cross = _root(root @ other_covariance @ root)  # its trace is that of (covariance other_covariance)^1/2
    distance = (mean - other_mean).square().sum() + (covariance + other_covariance - 2 * cross).trace()
    return float(distance.clamp_min(0))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


def _on_classifier(classifier: SceneClassifier, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
    parameter = next(classifier.parameters())
    for part in pictures.split(256):
        yield part.to(parameter.device, parameter.dtype)
