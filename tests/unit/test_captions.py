"""Captions, tokens and scenes say the same thing; what is outside the language is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtlynx.demo.captions import EMBED_CHANNELS, MAX_TOKENS, PAD, WORD_CHANNELS, WORDS, caption, encode, parse, tokens
from rtlynx.demo.scenes import COLOURS, POSITIONS, SHAPES, TEXTURES, random_scenes
from rtlynx.errors import InvalidArgumentError

_SMALL_WORDS = {"a", "an", "the", "at"}


def test_the_vocabulary_fits_its_one_hot() -> None:
    assert len(set(WORDS)) == len(WORDS) <= WORD_CHANNELS
    assert WORDS[PAD] == ""


def test_wording() -> None:
    text = "a red circle at the top left and an orange star at the centre on yellow stripes"
    scenes = parse([text])
    assert [SHAPES[index] for index in scenes.shape[0]] == ["circle", "star"]
    assert [COLOURS[index] for index in scenes.colour[0]] == ["red", "orange"]
    assert [POSITIONS[index] for index in scenes.position[0]] == ["top left", "centre"]
    assert (TEXTURES[scenes.texture[0]], COLOURS[scenes.ground[0]]) == ("stripes", "yellow")
    assert caption(scenes) == [text]


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_captions_and_tokens_round_trip(seed: int) -> None:
    scenes = random_scenes(32, torch.Generator().manual_seed(seed))
    texts = caption(scenes)
    parsed = parse(texts)
    assert caption(parsed) == texts
    assert torch.equal(parsed.present, scenes.present)
    rows = tokens(scenes)
    assert torch.equal(tokens(parsed), rows)
    for text, row in zip(texts, rows, strict=True):
        expected = [word for word in text.split() if word not in _SMALL_WORDS]
        assert [WORDS[token] for token in row] == expected + [""] * (MAX_TOKENS - len(expected))


@pytest.mark.parametrize(
    "text",
    [
        "red circle top left on yellow stripes",
        "A red circle, at the top left, on yellow stripes.",
        "a small red circle in the top left on a yellow striped background",
    ],
)
def test_small_words_case_and_punctuation_do_not_matter(text: str) -> None:
    assert caption(parse([text])) == ["a red circle at the top left on yellow stripes"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red dog at the centre on plain blue", 'unknown word "dog".*circle'),
        ("a circle at the centre on plain blue", '"circle".*red or orange'),
        ("a red circle on plain blue", '"on".*top or bottom or centre'),
        ("a red circle at the top on plain blue", '"on".*left or right'),
        ("a red circle at the centre", "the end.*expected on"),
        ("a red circle at the centre on blue", "the end.*stripes or checks or dots"),
        ("", "the end.*red or orange"),
        ("a red circle at the centre on plain blue stripes", '"stripes" after the background'),
        ("a red star top left and a blue star top left on plain green", "same place"),
        ("a red star at the centre on red dots", "as red as its background"),
        ("a red star top left and a blue star top right and a cyan ring at the centre on plain green", '"and"'),
    ],
)
def test_prompts_outside_the_language_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        parse([text])
    assert caught.value.argument == "prompt"


def test_an_empty_list_of_prompts_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one caption"):
        parse([])


def test_encoding_is_a_word_and_its_phrase_per_token() -> None:
    rows = tokens(parse(["a red circle at the top left and a blue star at the centre on yellow stripes"]))
    embeds, bag = encode(rows, torch.bfloat16)
    assert embeds.shape == (1, MAX_TOKENS, EMBED_CHANNELS) and bag.shape == (1, WORD_CHANNELS)
    assert embeds.dtype == bag.dtype == torch.bfloat16
    assert torch.equal(embeds[:, :, :WORD_CHANNELS].argmax(2), rows)

    def said(counts: torch.Tensor) -> set[str]:
        return {WORDS[token] for token in counts.nonzero().flatten().tolist()}

    phrases = [{"red", "circle", "top", "left"}] * 4 + [{"and", "blue", "star", "centre"}] * 4 + [{"on", "yellow", "stripes"}] * 3
    assert [said(row) for row in embeds[0, :, WORD_CHANNELS:]] == phrases + [set()] * (MAX_TOKENS - len(phrases))
    assert said(bag[0]) == set.union(*phrases)


def test_the_empty_prompt_says_nothing() -> None:
    embeds, bag = encode(torch.full((2, MAX_TOKENS), PAD))
    assert not embeds[:, :, WORD_CHANNELS:].any() and not bag.any()
