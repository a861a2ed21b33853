"""Scenes as captions and as model inputs: wording, parsing, tokens, one-hot encoding.

The language is small and unambiguous::

    caption := object ["and" object] "on" ground
    object  := COLOUR SHAPE ("centre" | ("top" | "bottom") ("left" | "right"))
    ground  := "plain" COLOUR | COLOUR ("stripes" | "checks" | "dots")

Small words ("a", "at", "the", ...) may be added anywhere. No text encoder is needed: a token is its word beside the words of its phrase
(one object, or the ground), whose embedding the transformer's own ``context_embedder`` learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F

from rtlynx.errors import InvalidArgumentError

from .scenes import ABSENT, COLOURS, OBJECTS, POSITIONS, SHAPES, TEXTURES, Scenes

PAD = 0
WORDS = ("", *COLOURS, *SHAPES, "top", "bottom", "left", "right", "centre", "and", "on", *TEXTURES)  # a word's index is its token
MAX_TOKENS = 16
WORD_CHANNELS = 48  # width of a word's one-hot; more than there are words, so that the language can grow
EMBED_CHANNELS = 2 * WORD_CHANNELS  # word one-hot beside the counts of the words in its phrase

_IGNORED = frozenset({"a", "an", "the", "at", "in", "background", "small"})
_SYNONYMS = {"center": "centre", "middle": "centre", "striped": "stripes", "checked": "checks", "dotted": "dots"}
_TOKEN = {word: token for token, word in enumerate(WORDS)}


def caption(scenes: Scenes) -> list[str]:
    """One caption per scene, such as ``"a red circle at the top left and a blue star at the centre on yellow stripes"``."""
    texts = []
    for shapes, colours, positions, texture, ground in zip(
        scenes.shape.tolist(),
        scenes.colour.tolist(),
        scenes.position.tolist(),
        scenes.texture.tolist(),
        scenes.ground.tolist(),
        strict=True,
    ):
        objects = [
            f"{_article(COLOURS[colour])} {COLOURS[colour]} {SHAPES[shape]} at the {POSITIONS[position]}"
            for shape, colour, position in zip(shapes, colours, positions, strict=True)
            if shape != ABSENT
        ]
        background = f"plain {COLOURS[ground]}" if TEXTURES[texture] == "plain" else f"{COLOURS[ground]} {TEXTURES[texture]}"
        texts.append(f"{' and '.join(objects)} on {background}")
    return texts


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def parse(captions: Sequence[str]) -> Scenes:
    """The scenes that captions ask for, on the CPU.

    Raises:
        InvalidArgumentError: a word outside the vocabulary or a caption outside the language; says which.
    """
    parsed = [_Parser(text).scene() for text in captions]
    if not parsed:
        raise InvalidArgumentError("scenes prompt", "prompt", "an empty list", "at least one caption")
    objects = torch.tensor([scene[0] for scene in parsed])  # (n, 2, 3): shape, colour, position
    grounds = torch.tensor([scene[1] for scene in parsed])  # (n, 2): texture, colour
    return Scenes(objects[:, :, 0], objects[:, :, 1], objects[:, :, 2], grounds[:, 0], grounds[:, 1])


class _Parser:
    """Recursive descent over one caption's words."""

    def __init__(self, text: str) -> None:
        words = [_SYNONYMS.get(word, word) for word in text.lower().replace(",", " ").replace(".", " ").split()]
        self.text = text
        self.words = [word for word in words if word not in _IGNORED]
        self.next = 0
        unknown = [word for word in self.words if word not in _TOKEN]
        if unknown:
            raise InvalidArgumentError(
                "scenes prompt", "prompt", f'the unknown word "{unknown[0]}" in "{text}"', f"words among: {', '.join(WORDS[1:])}"
            )

    def scene(self) -> tuple[list[tuple[int, int, int]], tuple[int, int]]:
        objects = [self._object()]
        while self._peek() == "and" and len(objects) < OBJECTS:
            self._take("and")
            objects.append(self._object())
        self._take("on")
        texture, ground = self._ground()
        if self.next != len(self.words):
            self._refuse(f'"{self.words[self.next]}" after the background')
        if len({position for _, _, position in objects}) != len(objects):
            self._refuse("two objects in the same place", "objects in different places")
        if ground in {colour for _, colour, _ in objects}:
            self._refuse(f"an object as {COLOURS[ground]} as its background", "a background of another colour than the objects'")
        objects += [(ABSENT, 0, 0)] * (OBJECTS - len(objects))
        return objects, (texture, ground)

    def _object(self) -> tuple[int, int, int]:
        colour, shape = self._take(*COLOURS), self._take(*SHAPES)
        row = self._take("top", "bottom", "centre")
        position = row if row == "centre" else f"{row} {self._take('left', 'right')}"
        return SHAPES.index(shape), COLOURS.index(colour), POSITIONS.index(position)

    def _ground(self) -> tuple[int, int]:
        word = self._take("plain", *COLOURS)
        if word == "plain":
            return TEXTURES.index("plain"), COLOURS.index(self._take(*COLOURS))
        return TEXTURES.index(self._take(*TEXTURES[1:])), COLOURS.index(word)

    def _peek(self) -> str:
        return self.words[self.next] if self.next < len(self.words) else ""

    def _take(self, *allowed: str) -> str:
        word = self._peek()
        if word not in allowed:
            self._refuse(f'"{word}"' if word else "the end", f"{' or '.join(allowed)} as word {self.next + 1} (small words not counted)")
        self.next += 1
        return word

    def _refuse(self, got: str, expected: str = 'a caption like "a red circle at the top left on yellow stripes"') -> NoReturn:
        raise InvalidArgumentError("scenes prompt", "prompt", f'{got} in "{self.text}"', expected)


def tokens(scenes: Scenes) -> torch.Tensor:
    """Token indices (n, 16), int64, `PAD` behind the last word, on the scenes' device. Same words as `caption`, small ones left out."""
    device = scenes.device

    def table(*words: str) -> torch.Tensor:
        return torch.tensor([_TOKEN[word] for word in words], device=device)

    colours = table(*COLOURS)
    rows = table(*(position.split()[0] for position in POSITIONS))
    columns = table(*(position.split()[-1] if " " in position else "" for position in POSITIONS))
    shape_words = table(*SHAPES)[scenes.shape.clamp_min(0)]
    objects = torch.stack([colours[scenes.colour], shape_words, rows[scenes.position], columns[scenes.position]], 2)
    objects = objects * scenes.present[:, :, None]
    joint = table("and").expand(len(scenes)) * scenes.present[:, 1]
    plain = scenes.texture == TEXTURES.index("plain")
    texture, ground = table(*TEXTURES)[scenes.texture], colours[scenes.ground]
    background = torch.stack([table("on").expand(len(scenes)), torch.where(plain, texture, ground), torch.where(plain, ground, texture)], 1)
    words = torch.cat([objects[:, 0], joint[:, None], objects[:, 1], background], 1)
    words = words.gather(1, (words == PAD).long().argsort(dim=1, stable=True))  # close the gaps, keep the order
    return F.pad(words, (0, MAX_TOKENS - words.shape[1]), value=PAD)


def encode(token_rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs of token rows (n, 16): ``encoder_hidden_states`` (n, 16, 96) and ``pooled_projections`` (n, 48).

    A token is its word's one-hot beside the count of each word in its phrase, so that "red" knows which shape it colours: what the first
    layers of a text encoder find out. The pooled vector counts the words of the caption. A row of `PAD` alone is the empty prompt that
    guidance compares with.
    """
    words = F.one_hot(token_rows, WORD_CHANNELS).to(dtype)
    said = words * (token_rows != PAD)[:, :, None]
    phrase = ((token_rows == _TOKEN["and"]) | (token_rows == _TOKEN["on"])).cumsum(1)
    same_phrase = (phrase[:, :, None] == phrase[:, None, :]) & (token_rows != PAD)[:, :, None]
    return torch.cat([words, same_phrase.to(dtype) @ said], 2), said.sum(1)
