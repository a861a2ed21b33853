"""Pipelines of diffusers with small random transformers and autoencoders; prompts are embeddings, so they have no text encoders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from tiny_models import NEIGHBOURS, TINY


def autoencoder() -> AutoencoderKL:
    """Of pictures in 4 channels at half their size, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            shift_factor=0.0,
            scaling_factor=1.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()


def flux_pipeline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Images of 32×32 pixels are 64 tokens of 16 channels."""
    vae = autoencoder().to(device, dtype)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, TINY["flux"].build(device, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def noise_in_float32() -> Iterator[None]:
    """Noise is drawn in float32 and then rounded, so that pipelines of every dtype begin with the same; not every torch sees to that."""
    randn = torch.randn

    def drawn(*shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return randn(*shape, dtype=torch.float32, **options).to(dtype or torch.get_default_dtype())

    with mock.patch.object(torch, "randn", drawn):
        yield


@noise_in_float32()
def sample(pipe: Any, batch: int = 1, text: int = 11, **kwargs: Any) -> Tensor:
    """A few steps with fixed noise; pixels, or latents with ``output_type="latent"``."""
    rng = torch.Generator().manual_seed(6)
    dtype, device = pipe.transformer.dtype, getattr(pipe, "_execution_device", "cpu")
    prompt = {
        "prompt_embeds": torch.randn(batch, text, 64, generator=rng).to(device, dtype),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=rng).to(device, dtype),
    }
    defaults = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(7)}
    images: Tensor = pipe(**{**prompt, **defaults, **kwargs}).images
    return images


def picture() -> Tensor:
    """One to edit or to follow, of 32×32 pixels."""
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def flux_controlnet() -> Any:
    """A ControlNet for it that has something to say; a new one's answer is zero."""
    config = TINY["flux"].build("meta", torch.float32).config
    keys = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own
        torch.manual_seed(0)
        controlnet = FluxControlNetModel(**{key: config[key] for key in (*keys, "pooled_projection_dim", "axes_dims_rope")}).eval()
        for block in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
            nn.init.normal_(block.weight, std=0.05)
    return controlnet


def qwen_image_pipeline() -> Any:
    """Without an autoencoder: it gives latents. Pictures of 128×128 pixels are 64 tokens."""
    transformer = TINY["qwen_image"].build("cpu", torch.float32)
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image_turbo_pipeline() -> Any:
    """Without an autoencoder: it gives latents. Pictures of 128×128 pixels are 64 tokens. Turbo's schedule is shifted by 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(scheduler, None, None, None, TINY["z_image"].build("cpu", torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline() -> Any:
    """Pictures of 32×32 pixels are 64 tokens."""
    transformer = NEIGHBOURS["sd3"].build("cpu", torch.float32)
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), autoencoder(), *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image_pipeline() -> Any:
    """Pictures of 32×32 pixels are 64 tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = ZImagePipeline(scheduler, autoencoder(), None, None, TINY["z_image"].build("cpu", torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipeline(two: bool = False) -> Any:
    """Text to video: videos of 9 frames of 64×64 pixels are 48 tokens. As Wan 2.2 with `two` transformers, each for half of the way."""
    config = {**NEIGHBOURS["wan"].build("meta", torch.float32).config, "image_dim": None, "added_kv_proj_dim": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = WanTransformer3DModel.from_config(config).eval()
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ).eval()
        second = {"transformer_2": WanTransformer3DModel.from_config(config).eval(), "boundary_ratio": 0.5} if two else {}
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer, **second)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@noise_in_float32()
def sample_guided(pipe: Any, scale: float = 4.0, **kwargs: Any) -> Tensor:
    """Pixels of a prompt against another, of SD3, Z-Image or Wan: the first two run both in a forward, Wan each in one of its own."""
    rng = torch.Generator().manual_seed(4)
    prompts: dict[str, Any] = {name: torch.randn(1, 11, 64, generator=rng) for name in ("prompt_embeds", "negative_prompt_embeds")}
    side = 32
    if isinstance(pipe.transformer, ZImageTransformer2DModel):
        prompts = {name: [value[0]] for name, value in prompts.items()}
    elif isinstance(pipe.transformer, WanTransformer3DModel):
        prompts["num_frames"], side = 9, 64
    else:
        prompts |= {f"{name}pooled_prompt_embeds": torch.randn(1, 32, generator=rng) for name in ("", "negative_")}
    defaults = {"height": side, "width": side, "num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(7)}
    pixels: Tensor = pipe(**{**prompts, **defaults, **kwargs}, guidance_scale=scale, return_dict=False)[0]
    return pixels


@noise_in_float32()
def guided(pipe: Any, scale: float, **kwargs: Any) -> Tensor:
    """Latents of a prompt against another, of FLUX.1 or Qwen-Image: in two forwards a step where the scale is above 1."""
    rng = torch.Generator().manual_seed(4)
    on = {"device": getattr(pipe, "_execution_device", "cpu"), "dtype": pipe.transformer.dtype}
    prompts = {name: torch.randn(1, 11, 64, generator=rng).to(**on) for name in ("prompt_embeds", "negative_prompt_embeds")}
    settings = {"true_cfg_scale": scale, "output_type": "latent", "generator": torch.Generator().manual_seed(7), **kwargs}
    if isinstance(pipe.transformer, FluxTransformer2DModel):
        pooled = {f"{name}pooled_prompt_embeds": torch.randn(1, 32, generator=rng).to(**on) for name in ("", "negative_")}
        return sample(pipe, **prompts, **pooled, **settings)
    masks = {f"{name}_mask": torch.ones(value.shape[:2], dtype=torch.long, device=on["device"]) for name, value in prompts.items()}
    latents: Tensor = pipe(**prompts, **masks, **settings, height=128, width=128, num_inference_steps=3).images
    return latents


def flux_lora(seed: int, rank: int = 4, scale: float = 0.5) -> dict[str, Tensor]:
    """A LoRA file's content in diffusers' own naming."""
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    names += [f"single_transformer_blocks.{i}.attn.to_q" for i in range(2)]
    return lora(dict.fromkeys(names, (128, 128)), seed, rank, scale)


def lora(layers: Mapping[str, tuple[int, int]], seed: int, rank: int = 4, scale: float = 0.5) -> dict[str, Tensor]:
    """That of layers of a transformer, given as name → (K, N)."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, (k, n) in layers.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=rng) / k**0.5
        state[f"transformer.{name}.lora_B.weight"] = scale * torch.randn(n, rank, generator=rng)
    return state
