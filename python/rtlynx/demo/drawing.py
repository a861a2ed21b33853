"""Scenes to pictures: every object is a signed distance function, evaluated for the whole batch at once on any device."""

from __future__ import annotations

import math

import torch

from .scenes import SHAPES, TEXTURES, Scenes

SIZE = 64  # pixels a side

_RGB = (  # of scenes.COLOURS, 0..1
    (0.86, 0.12, 0.14),
    (0.97, 0.52, 0.06),
    (0.97, 0.86, 0.12),
    (0.13, 0.60, 0.22),
    (0.10, 0.78, 0.84),
    (0.13, 0.26, 0.84),
    (0.55, 0.18, 0.70),
)
_CENTRES = ((16.5, 16.5), (47.5, 16.5), (16.5, 47.5), (47.5, 47.5), (32.0, 32.0))  # of scenes.POSITIONS: x, y in pixels, y downwards

_CENTRE_JITTER = 2.0  # pixels, uniform to either side
_RADIUS = (9.0, 12.0)  # pixels
_TURN = math.radians(14)  # objects are turned by up to this
_PERIOD = (9.0, 13.0)  # pixels between stripes or dots
_TINT = 0.035  # standard deviation of an object's or ground's colour, per channel
_NOISE = 0.012  # standard deviation of each pixel


def draw(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """Pictures (n, 3, 64, 64), float32 in [-1, 1], on the generator's device.

    Size, place, angle, tint, the texture's phase and a slight noise are drawn from the generator, so the same scene gives many
    pictures.
    """
    scenes = scenes.to(generator.device)
    picture = _ground(scenes, generator)
    coverage, colour = _objects(scenes, generator)
    for slot in range(coverage.shape[1]):
        alpha = coverage[:, slot, None]
        picture = picture + alpha * (colour[:, slot, :, None, None] - picture)
    picture = picture + _NOISE * torch.randn(picture.shape, generator=generator, device=picture.device)
    return picture.clamp(0, 1) * 2 - 1


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _tinted(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """RGB (..., 3) of colour indices (...), each a little off its nominal value."""
    nominal = torch.tensor(_RGB, device=index.device)[index]
    return nominal + _TINT * torch.randn(nominal.shape, generator=generator, device=index.device)


def _pixel_grid(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y of the pixel centres, (64, 64) each."""
    axis = torch.arange(SIZE, device=device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _turned(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return cos * x + sin * y, cos * y - sin * x


def _ground(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """The textured background (n, 3, 64, 64): a pale tone of the ground's colour, the texture's figure in a fuller one."""
    n = len(scenes)
    colour = _tinted(scenes.ground, generator)
    figure_share = _uniform(generator, 0.50, 0.62, n, 1)
    pale = 1 + (colour - 1) * (figure_share - 0.32)
    full = 1 + (colour - 1) * figure_share

    plain, stripes, checks, dots = (scenes.texture == index for index in range(len(TEXTURES)))
    x, y = _pixel_grid(generator.device)
    turn = _uniform(generator, -_TURN, _TURN, n, 1, 1)
    turn = turn + stripes[:, None, None] * _uniform(generator, -math.pi / 2, math.pi / 2, n, 1, 1)  # stripes run in any direction
    x, y = _turned(x - SIZE / 2, y - SIZE / 2, turn)
    period = _uniform(generator, *_PERIOD, n, 1, 1) * torch.where(checks, 1.5, 1.0)[:, None, None]  # two cells to a check's period
    x = (x / period + _uniform(generator, 0, 1, n, 1, 1)) % 1 - 0.5  # -0.5..0.5 within a period
    y = (y / period + _uniform(generator, 0, 1, n, 1, 1)) % 1 - 0.5

    # Distances to the figure's edge in periods, negative inside. A check is the product of two square waves.
    to_stripe, to_row = x.abs() - 0.25, y.abs() - 0.25
    to_check = torch.where(to_stripe * to_row < 0, -1.0, 1.0) * torch.minimum(to_stripe.abs(), to_row.abs())
    to_dot = torch.hypot(x, y) - 0.27
    distance = torch.where(checks[:, None, None], to_check, torch.where(dots[:, None, None], to_dot, to_stripe)) * period
    figure = (0.5 - distance).clamp(0, 1).masked_fill(plain[:, None, None], 0.5)
    return pale[:, :, None, None] + figure[:, None] * (full - pale)[:, :, None, None]


def _objects(scenes: Scenes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage (n, 2, 64, 64) in 0..1 and colour (n, 2, 3) of each object; an absent one covers nothing."""
    n, slots = scenes.shape.shape
    centre = torch.tensor(_CENTRES, device=generator.device)[scenes.position] + _uniform(
        generator, -_CENTRE_JITTER, _CENTRE_JITTER, n, slots, 2
    )
    radius = _uniform(generator, *_RADIUS, n, slots, 1, 1)
    turn = _uniform(generator, -_TURN, _TURN, n, slots, 1, 1)
    x, y = _pixel_grid(generator.device)
    x, y = _turned((x - centre[:, :, 0, None, None]) / radius, (y - centre[:, :, 1, None, None]) / radius, turn)

    distance = torch.ones_like(x)
    for index, name in enumerate(SHAPES):
        distance = torch.where((scenes.shape == index)[:, :, None, None], _DISTANCE[name](x, y), distance)
    coverage = (0.5 - distance * radius).clamp(0, 1) * scenes.present[:, :, None, None]
    return coverage, _tinted(scenes.colour, generator)


# Signed distances for shapes of about unit radius, y downwards, negative inside.


def _circle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 0.92


def _ring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(x, y) - 0.74).abs() - 0.24


def _box(x: torch.Tensor, y: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _box(x, y, 0.80, 0.80)


def _cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))


def _triangle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    slope = math.radians(30)  # the two upper sides of an equilateral triangle that points up
    upper = math.cos(slope) * x.abs() - math.sin(slope) * y
    return torch.maximum(upper, y) - 0.56


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Fold the plane onto half a point of the star; the edge then is the line from the tip to the notch beside it.
    tip, notch, half = 1.12, 0.50, math.pi / 5
    angle = ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()
    length = torch.hypot(x, y)
    along, across = length * angle.cos(), length * angle.sin()
    edge_x, edge_y = notch * math.cos(half) - tip, notch * math.sin(half)
    return (edge_y * (along - tip) - edge_x * across) / math.hypot(edge_x, edge_y)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross}
