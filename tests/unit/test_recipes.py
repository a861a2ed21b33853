"""Which recipe serves which model, and what its patterns say; test_recipes_more.py holds them to full-size models."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

import rtlynx
from rtlynx.patterns import first_match
from rtlynx.recipes import GENERIC, RECIPES, Recipe, find_recipe


def on_meta(name: str, **config: object) -> nn.Module:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    assert isinstance(model, nn.Module)
    return model.to(torch.bfloat16)


def test_single_blocks_proj_out_is_not_the_models_own() -> None:
    model = rtlynx.apply(on_meta("FluxTransformer2DModel", num_layers=1, num_single_layers=1))
    rows = {row.name: row for row in rtlynx.summary(model)}
    assert rows["single_transformer_blocks.0.proj_out"].sparse
    assert not rows["proj_out"].sparse
    assert rows["proj_out"].kernel == "torch"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_layers_said_to_share_their_input_are_included(recipe: Recipe) -> None:
    for group in recipe.shared_inputs:
        for layer in group:
            prefixes = ("transformer_blocks.0", "single_transformer_blocks.0", "layers.0", "blocks.0")
            assert any(first_match(f"{prefix}.{layer}", recipe.include) for prefix in prefixes), layer


@pytest.mark.parametrize(
    ("name", "config", "sparse"),
    [
        # per block: an attention of 4 layers and a feed-forward of 2
        ("CogVideoXTransformer3DModel", {"num_layers": 2}, 2 * 6),
        ("CogView4Transformer2DModel", {"num_layers": 2}, 2 * 6),
        # per block: two attentions of 4 layers and a feed-forward of 2; the VACE block projects its output too
        ("WanVACETransformer3DModel", {"num_layers": 2, "vace_layers": [0]}, 3 * 10 + 1),
        # a double-stream block, a single-stream block, and two refiner blocks
        ("HunyuanImageTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, 12 + 5 + 2 * 6),
    ],
)
def test_generic_names_serve_other_transformers(name: str, config: dict[str, object], sparse: int) -> None:
    model = on_meta(name, **config)
    assert find_recipe(model) is GENERIC
    rows = [row for row in rtlynx.summary(rtlynx.apply(model)) if row.sparse]
    assert len(rows) == sparse, [row.name for row in rows]
    assert all("blocks." in row.name for row in rows)


def test_subclasses_and_copies_find_the_recipe_by_name() -> None:
    class FluxTransformer2DModel(nn.Module): ...

    class Finetune(FluxTransformer2DModel): ...

    assert find_recipe(Finetune()).name == "flux"
    assert find_recipe(nn.Sequential()) is GENERIC
