"""Pipelines of diffusers with small random transformers and autoencoders; prompts are embeddings, so they have no text encoders."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from torch import Tensor, nn

from tiny_models import TINY


def flux_pipeline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Images of 32×32 pixels are 64 tokens of 16 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = AutoencoderKL(
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
        )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae.to(device, dtype).eval(), None, None, None, None, TINY["flux"].build(device, dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def flux_lora(seed: int, rank: int = 4, scale: float = 0.5) -> dict[str, Tensor]:
    """A LoRA file's content in diffusers' own naming."""
    rng = torch.Generator().manual_seed(seed)
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    names += [f"single_transformer_blocks.{i}.attn.to_q" for i in range(2)]
    state = {}
    for name in names:
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, 128, generator=rng) / 128**0.5
        state[f"transformer.{name}.lora_B.weight"] = scale * torch.randn(128, rank, generator=rng)
    return state
