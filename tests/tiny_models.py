"""Small models of the three target families with random weights, and inputs for them; every linear width is one the kernels take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn


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


TINY: dict[str, Tiny] = {
    "flux": Tiny(_flux, _flux_inputs, 12 + 2 * 5),
    "qwen_image": Tiny(_qwen_image, _qwen_image_inputs, 2 * 12),
    "z_image": Tiny(_z_image, _z_image_inputs, (2 + 1 + 1) * 7),
}
