"""Small models of the three target families and their neighbours, with random weights, and inputs; every linear width suits the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from rtlynx.patterns import expand_braces


@dataclass(frozen=True)
class Tiny:
    """One small model: how to build it, what to feed it, and which layers the recipe must make sparse.

    Attributes:
        build: Makes the model with seeded weights: ``build(device, dtype)``.
        inputs: Keyword arguments of one forward: ``inputs(device, dtype)``, seeded.
        sparse_layers: How many linear layers are eligible.
    """

    build: Callable[[torch.device | str, torch.dtype], nn.Module]
    inputs: Callable[[torch.device | str, torch.dtype], dict[str, Any]]
    sparse_layers: int


def output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's prediction as one tensor, without gradients."""
    with torch.no_grad():
        sample = model(**inputs, return_dict=False)[0]
    return torch.stack(sample) if isinstance(sample, list) else sample


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def _seeded(make: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(device, dtype).eval()


def _flux(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )

    return _seeded(make, device, dtype)


def _flux_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 8, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "hidden_states": torch.randn(2, side * side, 16, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "pooled_projections": torch.randn(2, 32, generator=rng).to(device, dtype),
        "timestep": torch.tensor([0.3, 0.8], device=device, dtype=dtype),
        "img_ids": torch.cat([torch.zeros(side * side, 1), grid], 1).to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }


def _qwen_image(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
        )

    return _seeded(make, device, dtype)


def _qwen_image_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 8, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, side * side, 16, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "encoder_hidden_states_mask": torch.ones(2, text, device=device, dtype=torch.bool),
        "timestep": torch.tensor([0.3, 0.8], device=device, dtype=dtype),
        "img_shapes": [[(1, side, side)]] * 2,
    }


def _z_image(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return ZImageTransformer2DModel(
            in_channels=4, dim=192, n_layers=2, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=64, axes_dims=[8, 12, 12]
        )

    return _seeded(make, device, dtype)


def _z_image_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 16, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(3)
    return {
        "x": [torch.randn(4, 1, side, side, generator=rng).to(device, dtype) for _ in range(2)],
        "t": torch.tensor([0.3, 0.8], device=device, dtype=dtype),
        "cap_feats": [torch.randn(text + i, 64, generator=rng).to(device, dtype) for i in range(2)],
    }


SPARSE_LAYERS: dict[str, set[str]] = {
    "flux": {
        *expand_braces("transformer_blocks.0.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}"),
        *expand_braces("transformer_blocks.0.{ff,ff_context}.net.{0.proj,2}"),
        *expand_braces("single_transformer_blocks.{0,1}.{attn.to_q,attn.to_k,attn.to_v,proj_mlp,proj_out}"),
    },
    "qwen_image": {
        *expand_braces("transformer_blocks.{0,1}.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out}"),
        *expand_braces("transformer_blocks.{0,1}.{img_mlp,txt_mlp}.net.{0.proj,2}"),
    },
    "z_image": {
        *expand_braces("{layers.0,layers.1,noise_refiner.0,context_refiner.0}.attention.{to_q,to_k,to_v,to_out.0}"),
        *expand_braces("{layers.0,layers.1,noise_refiner.0,context_refiner.0}.feed_forward.{w1,w2,w3}"),
    },
}
"""Which layers of the models of `TINY` their recipes make sparse."""

TINY: dict[str, Tiny] = {
    "flux": Tiny(_flux, _flux_inputs, len(SPARSE_LAYERS["flux"])),
    "qwen_image": Tiny(_qwen_image, _qwen_image_inputs, len(SPARSE_LAYERS["qwen_image"])),
    "z_image": Tiny(_z_image, _z_image_inputs, len(SPARSE_LAYERS["z_image"])),
}


def _flux2(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            timestep_guidance_channels=32,
            axes_dims_rope=(8, 8, 8, 8),
        )

    return _seeded(make, device, dtype)


def _flux2_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 8, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(4)
    none, along = torch.zeros(1, dtype=torch.long), torch.arange(side)
    return {
        "hidden_states": torch.randn(2, side * side, 16, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "timestep": torch.tensor([0.3, 0.8], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5, 3.5], device=device, dtype=dtype),
        "img_ids": torch.cartesian_prod(none, along, along, none).to(device),
        "txt_ids": torch.cartesian_prod(none, none, none, torch.arange(text)).to(device),
    }


def _sd3(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=128,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )

    return _seeded(make, device, dtype)


def _sd3_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 16, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 4, side, side, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "pooled_projections": torch.randn(2, 32, generator=rng).to(device, dtype),
        "timestep": torch.tensor([300.0, 800.0], device=device, dtype=dtype),
    }


def _pixart(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=32,
            cross_attention_dim=128,
            caption_channels=64,
            use_additional_conditions=False,
        )

    return _seeded(make, device, dtype)


def _pixart_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 16, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(6)
    return {
        "hidden_states": torch.randn(2, 4, side, side, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "encoder_attention_mask": torch.ones(2, text, device=device, dtype=dtype),
        "timestep": torch.tensor([300, 800], device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def wan_as_loaded(model: Any, device: torch.device | str) -> Any:
    """The small Wan model with the parts in float32 that ``from_pretrained`` keeps in it."""
    kept = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    model.rope = NEIGHBOURS["wan"].build(device, torch.float32).rope
    return model


def _wan(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=64,
            freq_dim=32,
            ffn_dim=256,
            num_layers=2,
            image_dim=32,
            added_kv_proj_dim=128,
            rope_max_seq_len=32,
        )

    return _seeded(make, device, dtype)


def _wan_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 8, text: int = 512, image: int = 17) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 4, 3, side, side, generator=rng).to(device, dtype),
        "timestep": torch.tensor([300, 800], device=device),
        # always padded to 512: the model tells text from image by that
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "encoder_hidden_states_image": torch.randn(2, image, 32, generator=rng).to(device, dtype),
    }


def _hunyuan_video(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=64,
            pooled_projection_dim=32,
            rope_axes_dim=(8, 12, 12),
        )

    return _seeded(make, device, dtype)


def _hunyuan_video_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 8, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(8)
    return {
        "hidden_states": torch.randn(2, 4, 3, side, side, generator=rng).to(device, dtype),
        "timestep": torch.tensor([300, 800], device=device),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor([[text], [text - 5]])).to(device),
        "pooled_projections": torch.randn(2, 32, generator=rng).to(device, dtype),
        "guidance": torch.tensor([6000.0, 6000.0], device=device, dtype=dtype),
    }


def _ltx(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        return LTXVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=32,
            cross_attention_dim=128,
            num_layers=2,
            caption_channels=64,
        )

    return _seeded(make, device, dtype)


def _ltx_inputs(device: torch.device | str, dtype: torch.dtype, side: int = 6, text: int = 19) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(9)
    return {
        "hidden_states": torch.randn(2, 3 * side * side, 16, generator=rng).to(device, dtype),
        "encoder_hidden_states": torch.randn(2, text, 64, generator=rng).to(device, dtype),
        "timestep": torch.tensor([300, 800], device=device),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor([[text], [text - 5]])).to(device),
        "num_frames": 3,
        "height": side,
        "width": side,
    }


NEIGHBOURS: dict[str, Tiny] = {
    "flux2": Tiny(_flux2, _flux2_inputs, 12 + 2 * 2),
    # the second attention of the first block; no text output of the last
    "sd3": Tiny(_sd3, _sd3_inputs, 3 * 12 + 4 - 3),
    "pixart": Tiny(_pixart, _pixart_inputs, 2 * 10),
    "wan": Tiny(_wan, _wan_inputs, 2 * (10 + 2)),
    "hunyuan_video": Tiny(_hunyuan_video, _hunyuan_video_inputs, 12 + 2 * 5 + 6),
    "ltx": Tiny(_ltx, _ltx_inputs, 2 * 10),
}
"""The families around the three of `TINY`."""
