"""Small models with sparse layers, with what `rtlynx.fusions` does to their blocks and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.fusions import install_fusions
from tiny_models import NEIGHBOURS, TINY, output

F32 = torch.float32
ALL = {**TINY, **NEIGHBOURS}
ROTATING = ("FluxAttention", "FluxTransformerBlock", "QwenImageTransformerBlock", "WanAttention", "WanTransformerBlock")
"""What does without copies of queries and keys what it does eager on a GPU: these rotate them, or call what does."""


def sparse(family: str, dtype: torch.dtype = F32, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A small model with a branch in every layer, and its inputs."""
    tiny = ALL[family]
    model = rtlynx.apply(tiny.build("cpu", dtype), SparsityConfig(rank=16, **config))
    rng = torch.Generator()
    for layer in layers(model):
        rng.manual_seed(layer.in_features)
        down, up = (torch.randn(n, 16, generator=rng) / 30 for n in (layer.in_features, layer.out_features))
        layer.set_compensation(down, up, torch.randn(layer.in_features, generator=rng) / 10)
    return model, tiny.inputs("cpu", dtype)


def layers(root: nn.Module) -> list[SparseLinear]:
    return [module for module in root.modules() if isinstance(module, SparseLinear)]


def unfused(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the model gives without fusions, which it has again afterwards."""
    install_fusions(model, False)
    result = output(model, inputs)
    install_fusions(model)
    return result


def as_diffusers_has_it(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What ``run`` gives while the blocks of `ROTATING` are diffusers' own, and nothing else is changed."""
    swapped: list[Any] = [module for module in model.modules() if type(module).__name__ in ROTATING]
    assert swapped and all(hasattr(type(module), "unfused") for module in swapped)
    fused = [type(module) for module in swapped]
    for module in swapped:
        module.__class__ = type(module).unfused
    result = run()
    for module, cls in zip(swapped, fused, strict=True):
        module.__class__ = cls
    return result
