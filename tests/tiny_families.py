"""Small models of more families than `tiny_models` has, with random weights and inputs; every linear width suits the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tiny_models import NEIGHBOURS, TINY, Tiny

Rand = Callable[..., Tensor]
"""``rand(*shape)``: normal values of the model's dtype."""


def _tiny(cls: str, sparse: int, inputs: Callable[[Rand], dict[str, Any]], **config: Any) -> Tiny:
    def build(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = getattr(diffusers, cls)(**config)
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and not parameter.any():  # a gate that is shut: its branch would say nothing
                    nn.init.normal_(parameter, std=0.02)
        model = model.to(device, dtype).eval()
        kept = set(model._keep_in_fp32_modules or ())  # as from_pretrained does
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model  # type: ignore[no-any-return]

    def make_inputs(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(len(cls))
        made = inputs(lambda *shape: torch.randn(shape, generator=rng).to(dtype))
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in made.items()}

    return Tiny(build, make_inputs, sparse)


def _like(tiny: Tiny, **more: Any) -> Callable[[Rand], dict[str, Any]]:
    """The inputs of another small model; those that are None are left out."""

    def inputs(rand: Rand) -> dict[str, Any]:
        made = {**tiny.inputs("cpu", rand(1).dtype), **{key: value(rand) if callable(value) else value for key, value in more.items()}}
        return {key: value for key, value in made.items() if value is not None}

    return inputs


SIDE, TEXT = 8, 19
NOISY = torch.tensor([0.3, 0.8])
STEPS = torch.tensor([300, 800])
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
MASK = torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 5]])

WAN = {
    **HEADS,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 2,
    "image_dim": 32,
    "added_kv_proj_dim": 128,
    "rope_max_seq_len": 32,
}
FAMILIES = {
    "longcat_image": _tiny(
        "LongCatImageTransformer2DModel",
        12 + 2 * 5,
        _like(TINY["flux"], pooled_projections=None),
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    ),
    "ovis_image": _tiny(
        "OvisImageTransformer2DModel",
        12 + 2 * 5,
        _like(TINY["flux"], pooled_projections=None),
        **HEADS,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    ),
    "flux3": _tiny(
        "Flux3Transformer2DModel",
        # a block for each kind of tokens, and two for all
        3 * 6 + 2 * 6,
        lambda rand: {
            "hidden_states": rand(2, SIDE * SIDE, 16),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "timestep": NOISY,
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, SIDE, SIDE, 1))),
            "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT))),
            "image_cond_hidden_states": rand(2, SIDE * SIDE, 16),
            "image_cond_ids": torch.cartesian_prod(*map(torch.arange, (1, SIDE, SIDE, 1))),
        },
        **HEADS,
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=64,
        timestep_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    ),
    "qwen_image_21": _tiny(
        "QwenImage21Transformer2DModel",
        2 * 7,
        lambda rand: {
            "hidden_states": rand(2, 2 * SIDE * SIDE, 16),
            "encoder_hidden_states": rand(2, TEXT + SIDE * SIDE // 4, 64),
            "timestep": NOISY,
            "img_shapes": [[(1, SIDE, SIDE), (1, SIDE, SIDE)]] * 2,
            # text, the given picture, text, the new picture: a slot for every four tokens
            "img_mask": torch.tensor([[False] * 10 + [True] * 16 + [False] * (TEXT - 10) + [True] * 16] * 2),
        },
        **HEADS,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        context_in_dim=64,
        axes_dims_rope=(8, 12, 12),
    ),
    "krea2": _tiny(
        "Krea2Transformer2DModel",
        # two blocks, and one of either kind in the fusion of the text
        4 * 8,
        lambda rand: {
            "hidden_states": rand(2, SIDE * SIDE, 16),
            "encoder_hidden_states": rand(2, TEXT, 3, 64),
            "timestep": NOISY,
            "position_ids": torch.cat([torch.zeros(TEXT, 3).long(), torch.cartesian_prod(*map(torch.arange, (1, SIDE, SIDE)))]),
            "encoder_attention_mask": MASK,
        },
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_key_value_heads=2,
        intermediate_size=256,
        timestep_embed_dim=32,
        text_hidden_dim=64,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=128,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    ),
    "ltx2": _tiny(
        "LTX2VideoTransformer3DModel",
        2 * (6 * 4 + 4),
        lambda rand: {
            "hidden_states": rand(2, 3 * 6 * 6, 16),
            "audio_hidden_states": rand(2, 12, 16),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "audio_encoder_hidden_states": rand(2, TEXT, 64),
            "timestep": STEPS,
            "num_frames": 3,
            "height": 6,
            "width": 6,
            "audio_num_frames": 12,
        },
        **HEADS,
        in_channels=16,
        out_channels=16,
        cross_attention_dim=128,
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=4,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=64,
        num_layers=2,
        caption_channels=64,
    ),
    "lumina2": _tiny(
        "Lumina2Transformer2DModel",
        4 * 7,
        lambda rand: {
            "hidden_states": rand(2, 4, 16, 16),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "timestep": NOISY,
            "encoder_attention_mask": MASK,
        },
        in_channels=4,
        hidden_size=192,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        multiple_of=64,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(64, 32, 32),
        cap_feat_dim=64,
    ),
    "aura_flow": _tiny(
        "AuraFlowTransformer2DModel",
        14 + 2 * 7,
        lambda rand: {"hidden_states": rand(2, 4, 16, 16), "encoder_hidden_states": rand(2, TEXT, 64), "timestep": NOISY},
        **HEADS,
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pos_embed_max_size=64,
    ),
    "hidream": _tiny(
        "HiDreamImageTransformer2DModel",
        # attention, the text's MLP, and the experts with the one that all share
        (8 + 3 + 3 * 3) + 2 * (4 + 3 * 3),
        lambda rand: {
            "hidden_states": rand(2, 4, 16, 16),
            "timesteps": STEPS,
            "encoder_hidden_states_t5": rand(2, TEXT, 64),
            "encoder_hidden_states_llama3": rand(3, 2, TEXT, 64),
            "pooled_embeds": rand(2, 64),
        },
        **HEADS,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        caption_channels=[64, 64],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 12, 12),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 2],
    ),
    "cogvideox": _tiny(
        "CogVideoXTransformer3DModel",
        2 * 6,
        lambda rand: {"hidden_states": rand(2, 3, 4, 8, 8), "encoder_hidden_states": rand(2, TEXT, 64), "timestep": STEPS},
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
    ),
    "sana": _tiny(
        "SanaTransformer2DModel",
        2 * 8,
        lambda rand: {"hidden_states": rand(2, 4, 8, 8), "encoder_hidden_states": rand(2, TEXT, 64), "timestep": STEPS},
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=64,
        sample_size=8,
    ),
    "hunyuan_image": _tiny(
        "HunyuanImageTransformer2DModel",
        12 + 2 * 5 + 6,
        lambda rand: {
            "hidden_states": rand(2, 4, 8, 8),
            "timestep": STEPS.to(rand(1).dtype),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "encoder_attention_mask": MASK,
        },
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=64,
        rope_axes_dim=(16, 16),
    ),
    "hunyuan_video_15": _tiny(
        "HunyuanVideo15Transformer3DModel",
        2 * 12 + 6,
        lambda rand: {
            "hidden_states": rand(2, 9, 3, 8, 8),
            "timestep": STEPS.to(rand(1).dtype),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "encoder_attention_mask": MASK,
            "encoder_hidden_states_2": rand(2, 8, 64),
            "encoder_attention_mask_2": torch.ones(2, 8),
            "image_embeds": rand(2, 17, 64),
        },
        **HEADS,
        in_channels=9,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=64,
        text_embed_2_dim=64,
        image_embed_dim=64,
        rope_axes_dim=(8, 12, 12),
    ),
    "hunyuan_video_framepack": _tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        12 + 2 * 5 + 6,
        _like(
            NEIGHBOURS["hunyuan_video"],
            image_embeds=lambda rand: rand(2, 17, 64),
            indices_latents=torch.arange(3),
            latents_clean=lambda rand: rand(2, 4, 2, SIDE, SIDE),
            indices_latents_clean=torch.arange(2),
            latents_history_2x=lambda rand: rand(2, 4, 2, SIDE, SIDE),
            indices_latents_history_2x=torch.arange(2),
            latents_history_4x=lambda rand: rand(2, 4, 4, SIDE, SIDE),
            indices_latents_history_4x=torch.arange(4),
        ),
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 12, 12),
        has_image_proj=True,
        image_proj_dim=64,
        has_clean_x_embedder=True,
    ),
    "wan_vace": _tiny(
        "WanVACETransformer3DModel",
        3 * (10 + 2) + 1,
        _like(NEIGHBOURS["wan"], control_hidden_states=lambda rand: rand(2, 8, 3, SIDE, SIDE)),
        **WAN,
        in_channels=4,
        out_channels=4,
        vace_layers=[0],
        vace_in_channels=8,
    ),
    "wan_animate": _tiny(
        "WanAnimateTransformer3DModel",
        2 * (10 + 2) + 2,
        _like(
            NEIGHBOURS["wan"],
            hidden_states=lambda rand: rand(2, 12, 3, SIDE, SIDE),
            pose_hidden_states=lambda rand: rand(2, 4, 2, SIDE, SIDE),
            face_pixel_values=lambda rand: rand(2, 3, 5, 16, 16),
        ),
        **WAN,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
    "skyreels_v2": _tiny("SkyReelsV2Transformer3DModel", 2 * (10 + 2), _like(NEIGHBOURS["wan"]), **WAN, in_channels=4, out_channels=4),
    "chronoedit": _tiny("ChronoEditTransformer3DModel", 2 * (10 + 2), _like(NEIGHBOURS["wan"]), **WAN, in_channels=4, out_channels=4),
}
"""Families and relatives of families that have a recipe."""

WITHOUT_RECIPE = {
    "cogview4": _tiny(
        "CogView4Transformer2DModel",
        2 * 6,
        lambda rand: {
            "hidden_states": rand(2, 4, 16, 16),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "timestep": STEPS,
            "original_size": torch.tensor([[128, 128]] * 2),
            "target_size": torch.tensor([[128, 128]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=64,
        time_embed_dim=64,
        condition_dim=32,
        sample_size=16,
    ),
    "kandinsky5": _tiny(
        "Kandinsky5Transformer3DModel",
        # a block for the text, and two for the video that have a second attention
        6 + 2 * 10,
        lambda rand: {
            "hidden_states": rand(2, 3, 8, 8, 4),
            "encoder_hidden_states": rand(2, TEXT, 64),
            "timestep": STEPS.to(rand(1).dtype),
            "pooled_projections": rand(2, 64),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(TEXT),
        },
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=64,
        in_text_dim2=64,
        time_dim=64,
        model_dim=128,
        ff_dim=256,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
    ),
}
"""Families that the generic patterns serve."""
