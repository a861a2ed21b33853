"""The recipes name exactly the layers they should on the full-size models, built on the meta device."""

from __future__ import annotations

import re
from collections import Counter

import diffusers
import pytest
import torch
from torch import nn

import rtlynx
from rtlynx.patterns import first_match
from rtlynx.recipes import GENERIC, RECIPES, Recipe, find_recipe
from rtlynx.summary import Summary

# (pattern with the block's number as *, K, N): count, of every layer that must be sparse
FLUX = {
    **{(f"transformer_blocks.*.attn.{name}", 3072, 3072): 19 for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{(f"transformer_blocks.*.attn.{name}", 3072, 3072): 19 for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{(f"transformer_blocks.*.{name}.net.0.proj", 3072, 12288): 19 for name in ("ff", "ff_context")},
    **{(f"transformer_blocks.*.{name}.net.2", 12288, 3072): 19 for name in ("ff", "ff_context")},
    **{(f"single_transformer_blocks.*.attn.{name}", 3072, 3072): 38 for name in ("to_q", "to_k", "to_v")},
    ("single_transformer_blocks.*.proj_mlp", 3072, 12288): 38,
    ("single_transformer_blocks.*.proj_out", 15360, 3072): 38,
}
QWEN_IMAGE = {
    **{(f"transformer_blocks.*.attn.{name}", 3072, 3072): 60 for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{(f"transformer_blocks.*.attn.{name}", 3072, 3072): 60 for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")},
    **{(f"transformer_blocks.*.{name}.net.0.proj", 3072, 12288): 60 for name in ("img_mlp", "txt_mlp")},
    **{(f"transformer_blocks.*.{name}.net.2", 12288, 3072): 60 for name in ("img_mlp", "txt_mlp")},
}
Z_IMAGE = {
    (f"{blocks}.*.{name}", k, n): count
    for blocks, count in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2))
    for name, k, n in (
        *((f"attention.{name}", 3840, 3840) for name in ("to_q", "to_k", "to_v", "to_out.0")),
        ("feed_forward.w1", 3840, 10240),
        ("feed_forward.w3", 3840, 10240),
        ("feed_forward.w2", 10240, 3840),
    )
}


def on_meta(name: str, **config: object) -> nn.Module:
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    assert isinstance(model, nn.Module)
    return model.to(torch.bfloat16)


def sparse_rows(summary: Summary) -> Counter[tuple[str, int, int]]:
    return Counter((re.sub(r"\.\d+\.", ".*.", r.name, count=1), r.in_features, r.out_features) for r in summary if r.sparse)


@pytest.mark.parametrize(
    ("name", "config", "linears", "expected"),
    [
        ("FluxTransformer2DModel", {"guidance_embeds": True}, 504, FLUX),
        ("QwenImageTransformer2DModel", {}, 846, QWEN_IMAGE),
        ("ZImageTransformer2DModel", {}, 276, Z_IMAGE),
    ],
)
def test_full_size_models(name: str, config: dict[str, object], linears: int, expected: dict[tuple[str, int, int], int]) -> None:
    model = rtlynx.apply(on_meta(name, **config))
    summary = rtlynx.summary(model)
    assert len(summary) == linears
    assert sparse_rows(summary) == expected
    assert summary.sparse_flops_share > 0.99
    for row in summary:
        if not row.sparse:
            assert "one row per sample" in row.reason or "enter or leave" in row.reason, row
    recipe = find_recipe(model)
    for skip in recipe.paper_skip:
        assert any(first_match(row.name, [skip]) for row in summary if row.sparse), f"{skip} names no sparse layer"


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
