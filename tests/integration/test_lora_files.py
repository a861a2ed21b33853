"""LoRA files in whole sparse pipelines of every family but FLUX.1 (test_pipelines.py) and PixArt, whose pipelines take none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rtlynx
from more_pipelines import PIPELINES, draw
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.patterns import expand_braces
from tiny_models import relative_error
from tiny_pipelines import lora, qwen_image_pipeline, sample_guided, sd3_pipeline, wan_pipeline, z_image_pipeline

pytestmark = pytest.mark.usefixtures("others_warnings_are_not_ours")


def qwen_image_latents(pipe: Any) -> Tensor:
    prompt = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(4))
    arguments = {"prompt_embeds": prompt, "prompt_embeds_mask": torch.ones(1, 11, dtype=torch.long), "height": 128, "width": 128}
    return draw(pipe, {**arguments, "true_cfg_scale": 1.0, "output_type": "latent"})


def called_as_before(family: str) -> Callable[[Any], Tensor]:
    return lambda pipe: draw(pipe, PIPELINES[family].arguments())


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "sd3": (sd3_pipeline, sample_guided, "transformer_blocks.{0,1}.{attn.to_q,attn.to_v,attn.add_k_proj}"),
    "z_image": (z_image_pipeline, sample_guided, "{layers,noise_refiner}.0.attention.{to_q,to_v,to_out.0}"),
    "wan": (wan_pipeline, sample_guided, "blocks.{0,1}.{attn1.to_q,attn1.to_v,attn2.to_k}"),
    "qwen_image": (qwen_image_pipeline, qwen_image_latents, "transformer_blocks.{0,1}.{attn.to_q,attn.add_k_proj,img_mlp.net.2}"),
    "flux2": (
        PIPELINES["flux2"].make,
        called_as_before("flux2"),
        "{transformer_blocks.0.attn.{to_q,add_k_proj},single_transformer_blocks.{0,1}.attn.{to_qkv_mlp_proj,to_out}}",
    ),
    "ltx": (PIPELINES["ltx"].make, called_as_before("ltx"), "transformer_blocks.{0,1}.{attn1.to_q,attn2.to_k,ff.net.2}"),
    "hunyuan_video": (
        PIPELINES["hunyuan_video"].make,
        called_as_before("hunyuan_video"),
        "{transformer_blocks.0.attn.{to_q,add_k_proj},single_transformer_blocks.{0,1}.{attn.to_v,proj_mlp}}",
    ),
}
"""Family → its pipeline, a picture or video of it, and layers for a LoRA."""


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_files(family: str) -> None:
    make, drawn, names = FAMILIES[family]
    pipe = rtlynx.apply(make(), SparsityConfig(rank=16))
    adapted = {name: pipe.transformer.get_submodule(name) for name in expand_braces(names)}
    assert all(isinstance(layer, SparseLinear) for layer in adapted.values())
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in adapted.items()}
    plain = drawn(pipe)
    pipe.load_lora_weights(lora(shapes, 1), adapter_name="style")
    assert all(pipe.transformer.get_submodule(name).base_layer is layer for name, layer in adapted.items())
    style = drawn(pipe)
    pipe.load_lora_weights(lora(shapes, 2), adapter_name="subject")
    pipe.set_adapters(["style", "subject"], [1.0, 0.5])
    both = drawn(pipe)
    assert relative_error(style, plain) > 1e-4 and relative_error(both, style) > 1e-4
    pipe.set_adapters("style")
    assert torch.equal(drawn(pipe), style)
    pipe.fuse_lora(adapter_names=["style"])
    assert relative_error(drawn(pipe), style) < relative_error(style, plain)  # what is dropped differs, the adapter is there
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert all(pipe.transformer.get_submodule(name) is layer for name, layer in adapted.items())
    assert relative_error(drawn(pipe), plain) < 1e-3  # weights come back up to rounding, which may choose other channels
