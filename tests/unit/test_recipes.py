"""Which recipe serves which model, and what its patterns say; test_recipes_more.py holds them to full-size models."""

from __future__ import annotations

import diffusers
import pytest
import torch
from packaging.version import Version
from torch import nn

import rtlynx
from rtlynx.patterns import expand_braces, first_match
from rtlynx.recipes import GENERIC, RECIPES, find_recipe


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


@pytest.mark.parametrize(
    ("cls", "recipe"),
    [
        ("HunyuanVideoFramepackTransformer3DModel", "hunyuan-video"),
        ("HunyuanImageTransformer2DModel", "hunyuan-video"),
        ("LTX2VideoTransformer3DModel", "ltx2"),
        ("QwenImageControlNetModel", "qwen-image"),
        ("QwenImage21Transformer2DModel", "qwen-image-2.1"),
        ("WanVACETransformer3DModel", "wan"),
        ("WanAnimateTransformer3DModel", "wan"),
        ("ZImageControlNetModel", "z-image"),
        ("CogView4Transformer2DModel", "generic"),
    ],
)
def test_which_recipe_serves_which_class(cls: str, recipe: str) -> None:
    bare = object.__new__(getattr(diffusers, cls))
    assert find_recipe(bare).name == recipe


def test_recipes_name_classes_that_diffusers_has() -> None:
    unknown = [cls for recipe in RECIPES for cls in recipe.classes if not hasattr(diffusers, cls)]
    assert not unknown or Version(diffusers.__version__) < Version("0.42"), unknown


@pytest.mark.parametrize(
    "name",
    [
        # diffusers: Kandinsky 5, PRX, JoyImage, OmniGen, HiDream, Nucleus-Image, ERNIE-Image, MiniMax-Music
        *expand_braces("visual_transformer_blocks.0.self_attention.{to_query,to_key,to_value,out_layer}"),
        *expand_braces("blocks.0.{attention.img_qkv_proj,attention.txt_kv_proj,gate_proj}"),
        *expand_braces("double_blocks.0.attn.{img_attn_qkv,txt_attn_proj}"),
        "layers.0.mlp.gate_up_proj",
        "double_stream_blocks.0.block.ff_i.experts.3.w2",
        "transformer_blocks.5.img_mlp.shared_expert.net.0.proj",
        "layers.0.mlp.linear_fc2",
        "transformer_blocks.0.ff_in",
        # the models' own code: FLUX.1 and HunyuanVideo, Wan, PixArt, Stable Diffusion 3
        *expand_braces("double_blocks.0.{img_attn.qkv,txt_attn.proj,img_mlp.0,txt_mlp.2}"),
        *expand_braces("single_blocks.0.{linear1,linear2}"),
        *expand_braces("blocks.0.{self_attn.q,cross_attn.o,ffn.0,ffn.2}"),
        *expand_braces("blocks.0.{attn.qkv,cross_attn.q_linear,cross_attn.kv_linear,mlp.fc1}"),
        *expand_braces("joint_blocks.0.x_block.{attn.proj,mlp.fc2}"),
    ],
)
def test_generic_patterns_know(name: str) -> None:
    assert first_match(name, GENERIC.include)
    assert not first_match(name, (*GENERIC.per_sample, *GENERIC.ends))


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_mod.lin",
        "blocks.0.adaLN_modulation.1",
        "blocks.0.modulation.lin",
        "layers.0.norm1.linear",
        "transformer_blocks.0.img_mlp.gate",  # chooses among experts
        "time_embed.pooler.to_q",
        "t_embedder.mlp.0",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "vision_model.proj",
        "proj_out",
        "final_layer.linear",
    ],
)
def test_generic_patterns_leave(name: str) -> None:
    assert not first_match(name, GENERIC.include)


def test_subclasses_and_copies_find_the_recipe_by_name() -> None:
    class FluxTransformer2DModel(nn.Module): ...

    class Finetune(FluxTransformer2DModel): ...

    assert find_recipe(Finetune()).name == "flux"
    assert find_recipe(nn.Sequential()) is GENERIC
