"""The judge: perfect readings score 1, each kind of mistake counts where it should, distances behave like distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rtlynx.demo.classifier import Reading, SceneClassifier, loss, targets, train_classifier
from rtlynx.demo.drawing import draw
from rtlynx.demo.metrics import attribute_score, frechet_distance, score_pictures
from rtlynx.demo.scenes import ABSENT, COLOURS, SHAPES, TEXTURES, Scenes, random_scenes

_N = 64


@pytest.fixture
def scenes() -> Scenes:
    return random_scenes(_N, torch.Generator().manual_seed(0))


def _perfect(scenes: Scenes) -> Reading:
    shape, colour = targets(scenes)
    return Reading(
        20.0 * F.one_hot(shape, len(SHAPES) + 1),
        20.0 * F.one_hot(colour.clamp_min(0), len(COLOURS)),
        20.0 * F.one_hot(scenes.texture, len(TEXTURES)),
        20.0 * F.one_hot(scenes.ground, len(COLOURS)),
    )


def test_targets_name_each_object_once(scenes: Scenes) -> None:
    shape, colour = targets(scenes)
    assert torch.equal((shape != len(SHAPES)).sum(1), scenes.present.sum(1))
    assert torch.equal(shape == len(SHAPES), colour == ABSENT)
    rows = torch.arange(_N)
    assert torch.equal(shape[rows, scenes.position[:, 0]], scenes.shape[:, 0])
    assert torch.equal(colour[rows, scenes.position[:, 0]], scenes.colour[:, 0])


def test_a_perfect_reading_scores_one_and_costs_nothing(scenes: Scenes) -> None:
    reading = _perfect(scenes)
    assert set(attribute_score(reading, scenes).to_dict().values()) == {1.0}
    assert loss(reading, scenes).item() < 1e-5


def test_one_wrong_texture(scenes: Scenes) -> None:
    reading = _perfect(scenes)
    reading.texture[0] = reading.texture[0].roll(1)
    score = attribute_score(reading, scenes)
    asked = 2 * int(scenes.present.sum()) + 2 * _N
    assert score.texture == score.all_right == 1 - 1 / _N
    assert score.mean == pytest.approx(1 - 1 / asked)
    assert score.shape == score.colour == score.ground == 1
    assert loss(reading, scenes).item() > 0.1


def test_an_object_nobody_asked_for_spoils_only_the_whole(scenes: Scenes) -> None:
    reading = _perfect(scenes)
    empty = int((targets(scenes)[0][3] == len(SHAPES)).nonzero()[0])
    reading.shape[3, empty] = 20.0 * F.one_hot(torch.tensor(0), len(SHAPES) + 1)
    score = attribute_score(reading, scenes)
    assert score.mean == 1 and score.all_right == 1 - 1 / _N


def test_swapped_colours_are_wrong(scenes: Scenes) -> None:
    two = scenes[(scenes.present[:, 1] & (scenes.colour[:, 0] != scenes.colour[:, 1])).nonzero()[:, 0]]
    swapped = Scenes(two.shape, two.colour.flip(1), two.position, two.texture, two.ground)
    score = attribute_score(_perfect(swapped), two)
    assert score.colour == score.all_right == 0 and score.shape == 1


def test_frechet_distance_grows_with_the_damage(scenes: Scenes) -> None:
    torch.manual_seed(0)
    classifier = SceneClassifier().eval()
    pictures = draw(random_scenes(160, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1))
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    same, little, much = (frechet_distance(classifier, pictures, pictures + strength * noise) for strength in (0.0, 0.2, 0.6))
    assert same == pytest.approx(0, abs=1e-6)
    assert 10 * max(same, 1e-9) < little < much
    assert frechet_distance(classifier, pictures + 0.2 * noise, pictures) == pytest.approx(little, rel=1e-3)


def test_the_classifier_learns_and_is_reproducible() -> None:
    losses: list[float] = []
    device = torch.device("cpu")
    classifier = train_classifier(device, seed=0, steps=80, batch=16, on_step=lambda step, error: losses.append(error))
    assert losses[-1] < 6.5, "untrained it is 7.2"
    assert len(losses) == 2 and losses[1] < losses[0]
    first, again = (train_classifier(device, seed=1, steps=1, batch=8).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    scenes = random_scenes(128, torch.Generator().manual_seed(9))
    pictures = draw(scenes, torch.Generator().manual_seed(9))
    assert score_pictures(classifier, pictures, scenes).ground > 0.3, "guessing gives 0.14"
