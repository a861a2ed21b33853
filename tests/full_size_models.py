"""Released models in full size; what becomes of each of their linear layers is in `tests/layers`, see `pinned_layers`.

The configurations, the defaults of diffusers' classes included, were compared with public sources; nothing was compared with the weights:

- FLUX.1, all four: src/flux/util.py of black-forest-labs/flux.
- FLUX.2-dev: scripts/convert_flux2_to_diffusers.py of huggingface/diffusers, src/flux2/model.py of black-forest-labs/flux2.
- Qwen-Image: diffsynth/models/qwen_image_dit.py of modelscope/DiffSynth-Studio, whose examples load the weights of Qwen-Image-Edit and
  Qwen-Image-Edit-2509 as those. Qwen-Image-Edit-2511: app/utils/model_utils.py of ModelTC/LightX2V. No file by the models' authors was
  found.
- Z-Image-Turbo: src/config/model.py of Tongyi-MAI/Z-Image. transformer/config.json, written with these values as diffusers 0.36.0.dev0
  would, has the MD5 sum that src/config/manifests/z-image-turbo.txt there gives. Z-Image: docs/z-image.md of zhutao100/Z-Image.swift, where
  the text's width is its encoder's; for the rotary embedding's axes no source was found, they are taken to be Turbo's.
- Chroma1-HD: src/models/chroma/model.py of lodestone-rock/flow, which names no release. The class's defaults agree, and its
  docstring refers to Chroma1-HD.
- SD3.5: tools/checkpoint_conversion/convert_stable_diffusion_3_checkpoints.py of keras-team/keras-hub; the widths of the texts in
  candle-transformers/src/models/mmdit/model.rs of huggingface/candle. Stability-AI/sd3.5 reads both off the weights.
- PixArt-Sigma: scripts/convert_pixart_sigma_to_diffusers.py of huggingface/diffusers, diffusion/model/nets/PixArtMS.py of
  PixArt-alpha/PixArt-sigma.
- Wan: scripts/convert_wan_to_diffusers.py of huggingface/diffusers, wan/configs of Wan-Video/Wan2.1 and Wan-Video/Wan2.2.
- HunyuanVideo: scripts/convert_hunyuan_video_to_diffusers.py of huggingface/diffusers, hyvideo/modules/models.py and hyvideo/config.py of
  Tencent-Hunyuan/HunyuanVideo.
- LTX-Video: scripts/convert_ltx_to_diffusers.py of huggingface/diffusers; 0.9 also ltx_video/utils/diffusers_config_mapping.py of
  Lightricks/LTX-Video.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A model in full size: its class, the recipe for it, and its configuration where it differs from the class's defaults."""

    cls: str
    recipe: str
    config: dict[str, Any] = field(default_factory=dict)

    def on_meta(self) -> nn.Module:
        """The model, without memory."""
        with torch.device("meta"):
            model = getattr(diffusers, self.cls)(**self.config)
        assert isinstance(model, nn.Module)
        return model


def _flux(**config: Any) -> Case:
    return Case("FluxTransformer2DModel", "flux", config)


def _qwen_image(**config: Any) -> Case:
    return Case("QwenImageTransformer2DModel", "qwen-image", config)


def _sd3(blocks: int, side: int, **config: Any) -> Case:
    """As many heads as blocks, of 64 channels each."""
    heads = {"num_layers": blocks, "num_attention_heads": blocks, "caption_projection_dim": 64 * blocks}
    return Case("SD3Transformer2DModel", "sd3", {**heads, "pos_embed_max_size": side, "qk_norm": "rms_norm", **config})


def _wan(**config: Any) -> Case:
    return Case("WanTransformer3DModel", "wan", config)


def _ltx(**config: Any) -> Case:
    return Case("LTXVideoTransformer3DModel", "ltx", config)


CASES = {
    "FLUX.1-schnell": _flux(),
    **dict.fromkeys(("FLUX.1-dev", "FLUX.1-Kontext-dev"), _flux(guidance_embeds=True)),  # Kontext's picture comes in as more tokens
    "FLUX.1-Fill-dev": _flux(guidance_embeds=True, in_channels=384, out_channels=64),
    **dict.fromkeys(("Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-Edit-2509"), _qwen_image()),
    "Qwen-Image-Edit-2511": _qwen_image(zero_cond_t=True),
    **dict.fromkeys(  # Turbo is distilled from the other
        ("Z-Image", "Z-Image-Turbo"),
        Case("ZImageTransformer2DModel", "z-image", {"axes_lens": [1536, 512, 512]}),
    ),
    "Chroma1-HD": Case("ChromaTransformer2DModel", "flux"),
    "FLUX.2-dev": Case("Flux2Transformer2DModel", "flux2"),
    "SD3.5-large": _sd3(38, side=192),
    "SD3.5-medium": _sd3(24, side=384, dual_attention_layers=tuple(range(13))),
    "PixArt-Sigma-XL-2-1024": Case(
        "PixArtTransformer2DModel",
        "pixart",
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
    ),
    "Wan2.1-T2V-14B": _wan(),
    "Wan2.1-T2V-1.3B": _wan(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan2.1-I2V-14B": _wan(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    # In 2.2 the picture comes in by channels alone: no layers for an image encoder's tokens. Both transformers are alike.
    "Wan2.2-I2V-A14B": _wan(in_channels=36),
    "Wan2.2-TI2V-5B": _wan(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    "HunyuanVideo": Case("HunyuanVideoTransformer3DModel", "hunyuan-video"),
    "LTX-Video-0.9": _ltx(),
    "LTX-Video-0.9.7-13B": _ltx(attention_head_dim=128, cross_attention_dim=4096, num_layers=48),
}
