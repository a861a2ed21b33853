"""The demo's data: random scenes keep their promises, and pictures show what the scenes say."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx.demo.drawing import _CENTRES, _RGB, SIZE, draw
from rtlynx.demo.scenes import ABSENT, COLOURS, POSITIONS, SHAPES, TEXTURES, Scenes, random_scenes


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _single(shape: str, colour: str, position: str, texture: str = "plain", ground: str = "green", copies: int = 1) -> Scenes:
    """The same scene with one object several times."""
    row = [SHAPES.index(shape), COLOURS.index(colour), POSITIONS.index(position)]
    objects = torch.tensor([row, [ABSENT, 0, 0]]).expand(copies, 2, 3)
    return Scenes(
        *(objects[:, :, field] for field in range(3)),
        torch.full((copies,), TEXTURES.index(texture)),
        torch.full((copies,), COLOURS.index(ground)),
    )


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_random_scenes_are_valid(seed: int) -> None:
    scenes = random_scenes(64, _generator(seed))
    assert len(scenes) == 64
    assert scenes.present[:, 0].all(), "the first slot is always filled"
    assert ((scenes.shape >= ABSENT) & (scenes.shape < len(SHAPES))).all()
    assert ((scenes.colour >= 0) & (scenes.colour < len(COLOURS))).all()
    assert ((scenes.position >= 0) & (scenes.position < len(POSITIONS))).all()
    assert ((scenes.texture >= 0) & (scenes.texture < len(TEXTURES))).all()
    assert (scenes.position[:, 0] != scenes.position[:, 1]).all()
    assert (scenes.ground[:, None] != scenes.colour).all(), "no object may vanish in a background of its colour"


def test_random_scenes_cover_every_attribute() -> None:
    scenes = random_scenes(4000, _generator())
    assert set(scenes.shape[:, 0].tolist()) == set(range(len(SHAPES)))
    assert set(scenes.shape[:, 1].tolist()) == {ABSENT, *range(len(SHAPES))}
    for field, names in ((scenes.colour, COLOURS), (scenes.position, POSITIONS)):
        for slot in range(2):
            assert set(field[:, slot].tolist()) == set(range(len(names)))
    assert set(scenes.texture.tolist()) == set(range(len(TEXTURES)))
    assert set(scenes.ground.tolist()) == set(range(len(COLOURS)))
    assert scenes.present[:, 1].double().mean().item() == pytest.approx(0.65, abs=0.03)


def test_the_seed_decides_scenes_and_pictures() -> None:
    first, again, other = (random_scenes(16, _generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.position, again.position)
    assert not torch.equal(first.position, other.position)
    assert torch.equal(draw(first, _generator(1)), draw(again, _generator(1)))
    assert not torch.equal(draw(first, _generator(1)), draw(first, _generator(2)))


def test_rows_and_concatenation() -> None:
    scenes = random_scenes(10, _generator())
    joined = Scenes.cat([scenes[:4], scenes[4:]])
    assert torch.equal(joined.shape, scenes.shape) and torch.equal(joined.ground, scenes.ground)


def test_pictures_have_the_documented_form() -> None:
    pictures = draw(random_scenes(32, _generator()), _generator())
    assert pictures.shape == (32, 3, SIZE, SIZE) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.isfinite().all()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_has_its_colour_at_its_place(colour: str, position: str) -> None:
    ground = "purple" if colour == "green" else "green"
    pictures = draw(_single("square", colour, position, ground=ground, copies=8), _generator()) / 2 + 0.5
    palette = torch.tensor(_RGB)
    for name, (x, y) in zip(POSITIONS, _CENTRES, strict=True):
        seen = pictures[:, :, int(y) - 2 : int(y) + 2, int(x) - 2 : int(x) + 2].mean((2, 3))
        nearest = torch.cdist(seen, palette).argmin(1)
        distance = torch.cdist(seen, palette[COLOURS.index(colour)][None])[:, 0]
        if name == position:
            assert (nearest == COLOURS.index(colour)).all()
        else:
            assert (distance > 0.25).all(), f"the {colour} square at the {position} also shows at the {name}"


def _mask(shape: str) -> torch.Tensor:
    """(64, 64) share of 32 pictures whose pixel belongs to the object at the centre: a purple object on plain yellow."""
    pictures = draw(_single(shape, "purple", "centre", ground="yellow", copies=32), _generator()) / 2 + 0.5
    return (pictures[:, 1] < 0.5).float().mean(0)


def test_every_two_shapes_differ() -> None:
    masks = {shape: _mask(shape) for shape in SHAPES}
    for shape, mask in masks.items():
        assert 60 < mask.sum() < 500, f"a {shape} covers {mask.sum():.0f} pixels"
    for one, other in combinations(SHAPES, 2):
        overlap = torch.minimum(masks[one], masks[other]).sum() / torch.maximum(masks[one], masks[other]).sum()
        assert overlap < 0.9, f"{one} and {other} overlap by {overlap:.2f}"


def test_shapes_are_what_they_are_called() -> None:
    masks = {shape: _mask(shape) for shape in SHAPES}
    middle = SIZE // 2
    assert masks["ring"][middle, middle] == 0 and masks["circle"][middle, middle] == 1
    upper, lower = masks["triangle"][: middle - 4].sum(), masks["triangle"][middle:].sum()
    assert lower > 2 * upper, "a triangle points up"
    tip, notch = masks["star"][middle - 10, middle], masks["star"][middle + 8, middle]
    assert tip > 0.2 > notch, "a star has a tip at the top and a notch at the bottom"
    corner = (slice(middle - 7, middle - 5), slice(middle - 7, middle - 5))
    assert masks["square"][corner].min() > 0.6 and masks["cross"][corner].max() < 0.2, "a cross lacks the square's corners"


def test_textures_differ_and_plain_is_plain() -> None:
    spread = {}
    for texture in TEXTURES:
        pictures = draw(_single("circle", "red", "top left", texture, copies=16), _generator())
        spread[texture] = pictures[:, 0, 36:, 36:].std((1, 2)).mean().item()  # a corner without objects
    assert spread["plain"] < 0.05
    assert all(spread[texture] > 0.1 for texture in TEXTURES[1:])
