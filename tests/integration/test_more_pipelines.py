"""Whole pipelines of diffusers that edit, fill, or are of other families than FLUX.1, Qwen-Image, Z-Image, SD3 and Wan: sparse and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor

import rtlynx
from more_pipelines import PIPELINES, draw
from rtlynx import SparsityConfig
from rtlynx.eligibility import sparse_layers
from tiny_models import relative_error

pytestmark = pytest.mark.usefixtures("others_warnings_are_not_ours")
SPARSE = SparsityConfig(small_m="sparse")


@pytest.fixture(autouse=True)
def given_pictures_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit would enlarge them to a million pixels."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (64, 64))


@pytest.mark.parametrize("name", PIPELINES)
def test_sparse_and_dense_again(name: str, selections: list[Tensor]) -> None:
    case = PIPELINES[name]
    pipe, arguments = case.make(), case.arguments()
    dense = draw(pipe, arguments)
    assert dense.shape == case.shape and dense.isfinite().all() and not selections

    rtlynx.apply(pipe, SPARSE)
    layers = sparse_layers(pipe.transformer)
    assert len(layers) == case.sparse_layers == sum(row.sparse for row in rtlynx.summary(pipe))
    got = draw(pipe, arguments)
    assert len(selections) == case.selections
    assert got.shape == dense.shape and got.isfinite().all()
    assert 1e-3 < relative_error(got, dense) < 0.1  # measured, from 0.003 to 0.043

    for layer in layers.values():
        layer.dense = True
    assert torch.equal(draw(pipe, arguments), dense)
    assert len(selections) == case.selections  # no more
    for layer in layers.values():
        layer.dense = False
    assert torch.equal(draw(pipe, arguments), got)

    rtlynx.remove(pipe)
    assert not sparse_layers(pipe.transformer)
    assert torch.equal(draw(pipe, arguments), dense)


@pytest.mark.parametrize("name", [name for name, case in PIPELINES.items() if "image" in case.arguments()])
def test_every_given_picture_counts(name: str) -> None:
    case = PIPELINES[name]
    pipe, arguments = rtlynx.apply(case.make(), SPARSE), case.arguments()
    given = arguments["image"]
    if isinstance(given, list):
        others: list[Any] = [[white(image) if i == j else image for j, image in enumerate(given)] for i in range(len(given))]
    else:
        others = [white(given)]
    got = draw(pipe, arguments)
    for other in others:
        error = relative_error(draw(pipe, {**arguments, "image": other}), got)
        assert error > 5e-4  # measured, from 0.0012 of Qwen-Image-Edit-2509 to 0.06 of FLUX.1 Fill


def white(given: Any) -> Any:
    return torch.ones_like(given) if isinstance(given, Tensor) else Image.new("RGB", given.size, "white")
