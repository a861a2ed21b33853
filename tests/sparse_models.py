"""The small models of `tiny_models`, all families in one table, with sparse layers that have a branch."""

from __future__ import annotations

from typing import Any

import torch

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from tiny_models import NEIGHBOURS, TINY, Tiny

MODELS: dict[str, Tiny] = TINY | NEIGHBOURS


def sparse(family: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **config: Any) -> Any:
    """A small model of the family; the branches are random."""
    return with_branches(MODELS[family].build(device, dtype), **config)


def with_branches(module_or_pipe: Any, **config: Any) -> Any:
    """A model or a pipeline, sparse from here on, with a random branch in every layer."""
    rtlynx.apply(module_or_pipe, SparsityConfig(rank=16, **config))
    rng = torch.Generator()
    for layer in getattr(module_or_pipe, "transformer", module_or_pipe).modules():
        if isinstance(layer, SparseLinear):
            k, n = layer.in_features, layer.out_features
            rng.manual_seed(k)  # layers that read one tensor share their comp_down
            layer.set_compensation(torch.randn(k, 16, generator=rng) / k**0.5, torch.randn(n, 16, generator=rng) / 9)
    return module_or_pipe
