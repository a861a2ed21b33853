"""What a picture of the demo's little world contains: a batch of scenes as integer tensors, and how scenes are drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "centre")
TEXTURES = ("plain", "stripes", "checks", "dots")

OBJECTS = 2  # slots per scene; the first is always filled
ABSENT = -1  # `shape` of an empty slot

_TWO_OBJECTS_SHARE = 0.65


@dataclass(frozen=True)
class Scenes:
    """A batch of n scenes. Every field holds indices (int64) into the tuple named here; all live on one device.

    Where ``shape`` is `ABSENT` (only ever in the second slot) that slot's colour and position mean nothing.
    """

    shape: torch.Tensor  # (n, 2) SHAPES or ABSENT
    colour: torch.Tensor  # (n, 2) COLOURS
    position: torch.Tensor  # (n, 2) POSITIONS, different in the two slots
    texture: torch.Tensor  # (n,) TEXTURES
    ground: torch.Tensor  # (n,) COLOURS, different from the objects' colours

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def present(self) -> torch.Tensor:
        """(n, 2) bool: which slots hold an object."""
        return self.shape != ABSENT

    @property
    def device(self) -> torch.device:
        return self.shape.device

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    @staticmethod
    def cat(batches: Iterable[Scenes]) -> Scenes:
        batches = list(batches)
        return Scenes(*(torch.cat([getattr(batch, field.name) for batch in batches]) for field in fields(Scenes)))


def random_scenes(n: int, generator: torch.Generator) -> Scenes:
    """n scenes, uniform over shapes, colours, positions and textures; two objects in 65 % of them. On the generator's device."""
    device = generator.device

    def randint(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    shape = randint(len(SHAPES), n, OBJECTS)
    single = torch.rand(n, generator=generator, device=device) >= _TWO_OBJECTS_SHARE
    shape[:, 1] = torch.where(single, ABSENT, shape[:, 1])
    colour = randint(len(COLOURS), n, OBJECTS)
    first = randint(len(POSITIONS), n)
    second = (first + randint(len(POSITIONS), n, low=1)) % len(POSITIONS)  # any position but the first's

    # The ground's colour: the best random score among the colours that no object wears.
    score = torch.rand(n, len(COLOURS), generator=generator, device=device)
    ground = score.scatter(1, colour, -1.0).argmax(1)
    return Scenes(shape, colour, torch.stack([first, second], 1), randint(len(TEXTURES), n), ground)
