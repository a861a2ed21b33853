"""Released models in full size: every linear layer, sparse or dense and why.

The configurations, the defaults of diffusers' classes included, were compared with public sources; nothing was compared with the weights:

- FLUX.1, all four: src/flux/util.py of black-forest-labs/flux.
- FLUX.2-dev: scripts/convert_flux2_to_diffusers.py of huggingface/diffusers, src/flux2/model.py of black-forest-labs/flux2.
- Qwen-Image: diffsynth/models/qwen_image_dit.py of modelscope/DiffSynth-Studio. Qwen-Image-Edit-2511: app/utils/model_utils.py of
  ModelTC/LightX2V. No file by the models' authors was found.
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

from rtlynx.patterns import expand_braces

Layers = dict[tuple[str, int, int], int]
"""(pattern with the block's number as *, K, N) → how many layers."""


def layers(*rows: tuple[str, int, int, int]) -> Layers:
    """From rows of (pattern, with braces for layers of one shape, K, N, count of each)."""
    return {(name, k, n): count for pattern, k, n, count in rows for name in expand_braces(pattern)}


@dataclass(frozen=True)
class Case:
    """A model in full size: its class, its configuration where it differs from the class's defaults, and its layers.

    Attributes:
        sparse: Those that carry the tokens.
        per_sample: Those that stay dense because they see one row per sample.
        ends: Those that stay dense because tokens enter or leave the model there.
        unnamed: Those that stay dense because the recipe does not name them.
    """

    cls: str
    config: dict[str, object]
    recipe: str
    sparse: Layers
    per_sample: Layers
    ends: Layers
    unnamed: Layers = field(default_factory=dict)


def flux_blocks(width: int, double: int, single: int) -> Layers:
    """The blocks of FLUX.1, which Chroma and HunyuanVideo have too."""
    return layers(
        ("transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}", width, width, double),
        ("transformer_blocks.*.{ff,ff_context}.net.0.proj", width, 4 * width, double),
        ("transformer_blocks.*.{ff,ff_context}.net.2", 4 * width, width, double),
        ("single_transformer_blocks.*.attn.{to_q,to_k,to_v}", width, width, single),
        ("single_transformer_blocks.*.proj_mlp", width, 4 * width, single),
        ("single_transformer_blocks.*.proj_out", 5 * width, width, single),
    )


def flux_modulation(double: int, single: int) -> Layers:
    return layers(
        ("transformer_blocks.*.{norm1,norm1_context}.linear", 3072, 6 * 3072, double),
        ("single_transformer_blocks.*.norm.linear", 3072, 3 * 3072, single),
        ("norm_out.linear", 3072, 2 * 3072, 1),
        ("time_text_embed.text_embedder.linear_1", 768, 3072, 1),
        ("time_text_embed.timestep_embedder.linear_1", 256, 3072, 1),
        ("time_text_embed.{text_embedder,timestep_embedder}.linear_2", 3072, 3072, 1),
    )


def guidance(embedder: str, width: int) -> Layers:
    return layers((f"{embedder}.guidance_embedder.linear_1", 256, width, 1), (f"{embedder}.guidance_embedder.linear_2", width, width, 1))


def sd3(width: int, blocks: int, dual: int) -> tuple[Layers, Layers, Layers]:
    """Sparse, per sample and ends; the last block computes no text, the first ``dual`` ones have a second attention."""
    sparse = layers(
        ("transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj}", width, width, blocks),
        ("transformer_blocks.*.attn.to_add_out", width, width, blocks - 1),
        ("transformer_blocks.*.ff.net.0.proj", width, 4 * width, blocks),
        ("transformer_blocks.*.ff.net.2", 4 * width, width, blocks),
        ("transformer_blocks.*.ff_context.net.0.proj", width, 4 * width, blocks - 1),
        ("transformer_blocks.*.ff_context.net.2", 4 * width, width, blocks - 1),
        *([("transformer_blocks.*.attn2.{to_q,to_k,to_v,to_out.0}", width, width, dual)] if dual else []),
    )
    per_sample = layers(
        ("transformer_blocks.*.norm1.linear", width, 6 * width, blocks - dual),
        *([("transformer_blocks.*.norm1.linear", width, 9 * width, dual)] if dual else []),
        ("transformer_blocks.*.norm1_context.linear", width, 6 * width, blocks - 1),
        ("transformer_blocks.*.norm1_context.linear", width, 2 * width, 1),
        ("norm_out.linear", width, 2 * width, 1),
        ("time_text_embed.text_embedder.linear_1", 2048, width, 1),
        ("time_text_embed.timestep_embedder.linear_1", 256, width, 1),
        ("time_text_embed.{text_embedder,timestep_embedder}.linear_2", width, width, 1),
    )
    return sparse, per_sample, layers(("context_embedder", 4096, width, 1), ("proj_out", width, 64, 1))


def cross_attention_blocks(blocks: str, width: int, ff: str, ff_width: int, count: int) -> Layers:
    """Blocks of self-attention, cross-attention and feed-forward: PixArt, Wan, LTX."""
    return layers(
        (f"{blocks}.*.{{attn1,attn2}}.{{to_q,to_k,to_v,to_out.0}}", width, width, count),
        (f"{blocks}.*.{ff}.net.0.proj", width, ff_width, count),
        (f"{blocks}.*.{ff}.net.2", ff_width, width, count),
    )


def wan(width: int, ff_width: int, count: int, channels: int) -> tuple[Layers, Layers, Layers]:
    per_sample = layers(
        ("condition_embedder.time_embedder.linear_1", 256, width, 1),
        ("condition_embedder.time_embedder.linear_2", width, width, 1),
        ("condition_embedder.time_proj", width, 6 * width, 1),
    )
    ends = layers(
        ("condition_embedder.text_embedder.linear_1", 4096, width, 1),
        ("condition_embedder.text_embedder.linear_2", width, width, 1),
        ("proj_out", width, 4 * channels, 1),
    )
    return cross_attention_blocks("blocks", width, "ffn", ff_width, count), per_sample, ends


def ltx(width: int, count: int) -> tuple[Layers, Layers, Layers]:
    per_sample = layers(
        ("time_embed.emb.timestep_embedder.linear_1", 256, width, 1),
        ("time_embed.emb.timestep_embedder.linear_2", width, width, 1),
        ("time_embed.linear", width, 6 * width, 1),
    )
    ends = layers(
        ("proj_in", 128, width, 1),
        ("caption_projection.linear_1", 4096, width, 1),
        ("caption_projection.linear_2", width, width, 1),
        ("proj_out", width, 128, 1),
    )
    return cross_attention_blocks("transformer_blocks", width, "ff", 4 * width, count), per_sample, ends


def qwen_image(**config: object) -> Case:
    sparse = layers(
        ("transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}", 3072, 3072, 60),
        ("transformer_blocks.*.{img_mlp,txt_mlp}.net.0.proj", 3072, 12288, 60),
        ("transformer_blocks.*.{img_mlp,txt_mlp}.net.2", 12288, 3072, 60),
    )
    per_sample = layers(
        ("transformer_blocks.*.{img_mod,txt_mod}.1", 3072, 6 * 3072, 60),
        ("norm_out.linear", 3072, 2 * 3072, 1),
        ("time_text_embed.timestep_embedder.linear_1", 256, 3072, 1),
        ("time_text_embed.timestep_embedder.linear_2", 3072, 3072, 1),
    )
    ends = layers(("img_in", 64, 3072, 1), ("txt_in", 3584, 3072, 1), ("proj_out", 3072, 64, 1))
    return Case("QwenImageTransformer2DModel", config, "qwen-image", sparse, per_sample, ends)


def z_image_blocks(blocks: str, count: int) -> Layers:
    return layers(
        (f"{blocks}.*.attention.{{to_q,to_k,to_v,to_out.0}}", 3840, 3840, count),
        (f"{blocks}.*.feed_forward.{{w1,w3}}", 3840, 10240, count),
        (f"{blocks}.*.feed_forward.w2", 10240, 3840, count),
    )


Z_IMAGE = Case(
    "ZImageTransformer2DModel",
    {"axes_lens": [1536, 512, 512]},
    "z-image",
    z_image_blocks("layers", 30) | z_image_blocks("noise_refiner", 2) | z_image_blocks("context_refiner", 2),
    layers(
        ("layers.*.adaLN_modulation.0", 256, 4 * 3840, 30),
        ("noise_refiner.*.adaLN_modulation.0", 256, 4 * 3840, 2),
        ("all_final_layer.2-1.adaLN_modulation.1", 256, 3840, 1),
        ("t_embedder.mlp.0", 256, 1024, 1),
        ("t_embedder.mlp.2", 1024, 256, 1),
    ),
    layers(("all_x_embedder.2-1", 64, 3840, 1), ("cap_embedder.1", 2560, 3840, 1), ("all_final_layer.2-1.linear", 3840, 64, 1)),
)
FLUX_DEV = Case(
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    "flux",
    flux_blocks(3072, 19, 38),
    flux_modulation(19, 38) | guidance("time_text_embed", 3072),
    layers(("x_embedder", 64, 3072, 1), ("context_embedder", 4096, 3072, 1), ("proj_out", 3072, 64, 1)),
)
WAN_14B = wan(5120, 13824, 40, 16)

CASES = {
    "FLUX.1-schnell": Case(
        "FluxTransformer2DModel",
        {},
        "flux",
        flux_blocks(3072, 19, 38),
        flux_modulation(19, 38),
        layers(("x_embedder", 64, 3072, 1), ("context_embedder", 4096, 3072, 1), ("proj_out", 3072, 64, 1)),
    ),
    **dict.fromkeys(("FLUX.1-dev", "FLUX.1-Kontext-dev"), FLUX_DEV),  # Kontext's picture comes in as more tokens
    "FLUX.1-Fill-dev": Case(
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        "flux",
        FLUX_DEV.sparse,
        FLUX_DEV.per_sample,
        layers(("x_embedder", 384, 3072, 1), ("context_embedder", 4096, 3072, 1), ("proj_out", 3072, 64, 1)),
    ),
    "Qwen-Image": qwen_image(),
    "Qwen-Image-Edit-2511": qwen_image(zero_cond_t=True),
    **dict.fromkeys(("Z-Image", "Z-Image-Turbo"), Z_IMAGE),  # Turbo is distilled from it
    "Chroma1-HD": Case(
        "ChromaTransformer2DModel",
        {},
        "flux",
        flux_blocks(3072, 19, 38),
        {},
        layers(("x_embedder", 64, 3072, 1), ("context_embedder", 4096, 3072, 1), ("proj_out", 3072, 64, 1)),
        unnamed=layers(
            ("distilled_guidance_layer.in_proj", 64, 5120, 1),
            ("distilled_guidance_layer.layers.*.{linear_1,linear_2}", 5120, 5120, 5),
            ("distilled_guidance_layer.out_proj", 5120, 3072, 1),
        ),
    ),
    "FLUX.2-dev": Case(
        "Flux2Transformer2DModel",
        {},
        "flux2",
        layers(
            ("transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}", 6144, 6144, 8),
            ("transformer_blocks.*.{ff,ff_context}.linear_in", 6144, 36864, 8),
            ("transformer_blocks.*.{ff,ff_context}.linear_out", 18432, 6144, 8),
            ("single_transformer_blocks.*.attn.to_qkv_mlp_proj", 6144, 55296, 48),
            ("single_transformer_blocks.*.attn.to_out", 24576, 6144, 48),
        ),
        layers(
            ("{double_stream_modulation_img,double_stream_modulation_txt}.linear", 6144, 36864, 1),
            ("single_stream_modulation.linear", 6144, 18432, 1),
            ("norm_out.linear", 6144, 12288, 1),
            ("time_guidance_embed.timestep_embedder.linear_1", 256, 6144, 1),
            ("time_guidance_embed.timestep_embedder.linear_2", 6144, 6144, 1),
        )
        | guidance("time_guidance_embed", 6144),
        layers(("x_embedder", 128, 6144, 1), ("context_embedder", 15360, 6144, 1), ("proj_out", 6144, 128, 1)),
    ),
    "SD3.5-large": Case(
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        "sd3",
        *sd3(2432, 38, dual=0),
    ),
    "SD3.5-medium": Case(
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        "sd3",
        *sd3(1536, 24, dual=13),
    ),
    "PixArt-Sigma-XL-2-1024": Case(
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        "pixart",
        cross_attention_blocks("transformer_blocks", 1152, "ff", 4608, 28),
        layers(
            ("adaln_single.emb.timestep_embedder.linear_1", 256, 1152, 1),
            ("adaln_single.emb.timestep_embedder.linear_2", 1152, 1152, 1),
            ("adaln_single.linear", 1152, 6912, 1),
        ),
        layers(("caption_projection.linear_1", 4096, 1152, 1), ("caption_projection.linear_2", 1152, 1152, 1), ("proj_out", 1152, 32, 1)),
    ),
    "Wan2.1-T2V-14B": Case("WanTransformer3DModel", {}, "wan", *WAN_14B),
    "Wan2.1-T2V-1.3B": Case(
        "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "wan", *wan(1536, 8960, 30, 16)
    ),
    "Wan2.1-I2V-14B": Case(
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "wan",
        WAN_14B[0] | layers(("blocks.*.attn2.{add_k_proj,add_v_proj}", 5120, 5120, 40)),
        WAN_14B[1],
        WAN_14B[2]
        | layers(
            ("condition_embedder.image_embedder.ff.net.*.proj", 1280, 1280, 1),
            ("condition_embedder.image_embedder.ff.net.2", 1280, 5120, 1),
        ),
    ),
    # In 2.2 the picture comes in by channels alone: no layers for an image encoder's tokens. Both transformers are alike.
    "Wan2.2-I2V-A14B": Case("WanTransformer3DModel", {"in_channels": 36}, "wan", *WAN_14B),
    "Wan2.2-TI2V-5B": Case(
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        "wan",
        *wan(3072, 14336, 30, 48),
    ),
    "HunyuanVideo": Case(
        "HunyuanVideoTransformer3DModel",
        {},
        "hunyuan-video",
        flux_blocks(3072, 20, 40)
        | layers(
            ("context_embedder.token_refiner.refiner_blocks.*.attn.{to_q,to_k,to_v,to_out.0}", 3072, 3072, 2),
            ("context_embedder.token_refiner.refiner_blocks.*.ff.net.0.proj", 3072, 12288, 2),
            ("context_embedder.token_refiner.refiner_blocks.*.ff.net.2", 12288, 3072, 2),
        ),
        flux_modulation(20, 40)
        | guidance("time_text_embed", 3072)
        | layers(
            ("context_embedder.token_refiner.refiner_blocks.*.norm_out.linear", 3072, 6144, 2),
            ("context_embedder.time_text_embed.text_embedder.linear_1", 4096, 3072, 1),
            ("context_embedder.time_text_embed.timestep_embedder.linear_1", 256, 3072, 1),
            ("context_embedder.time_text_embed.{text_embedder,timestep_embedder}.linear_2", 3072, 3072, 1),
        ),
        layers(("context_embedder.proj_in", 4096, 3072, 1), ("proj_out", 3072, 64, 1)),
    ),
    "LTX-Video-0.9": Case("LTXVideoTransformer3DModel", {}, "ltx", *ltx(2048, 28)),
    "LTX-Video-0.9.7-13B": Case(
        "LTXVideoTransformer3DModel", {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}, "ltx", *ltx(4096, 48)
    ),
}
