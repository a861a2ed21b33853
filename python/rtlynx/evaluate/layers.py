"""How far every sparse layer's output is from the dense one, on what the dense model feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from rtlynx.bias_groups import of_many_steps
from rtlynx.calibrate.collect import Budget, all_dense, available_memory, collect
from rtlynx.calibrate.runs import pipeline_runs
from rtlynx.eligibility import sparse_layers

_TOKENS_PER_CHANNEL = 0.5


@torch.no_grad()
def layer_errors(pipe: Any, model: nn.Module, prompts: Sequence[str], *, steps: int, seed: int, **pipe_kwargs: Any) -> dict[str, float]:
    """Relative output error of every layer that computes sparsely now, by name, in the model's order.

    With `adaln_shift` relative to the output without what the shift gives to it.
    """
    layers = {name: layer for name, layer in sparse_layers(model).items() if not layer.dense}
    device = getattr(pipe, "_execution_device", next(model.parameters()).device)
    runs = pipeline_runs("evaluate", pipe, list(prompts), None, seed, 1, {**pipe_kwargs, "num_inference_steps": steps})
    budget = Budget(_TOKENS_PER_CHANNEL, available_memory(device), device)
    errors: dict[str, float] = {}
    with tqdm(total=len(runs), disable=True) as bar:
        with all_dense(layers):
            timed = [model] if any(layer.bias_groups > 1 for layer in layers.values()) else []
            inputs = list(collect(layers, runs, budget, seed=seed, bar=bar, timed=timed))
        for input in inputs:
            x = input.samples.x
            for name, layer in input.layers.items():
                want = nn.functional.linear(x, layer.weight, layer.bias).float()
                errors[name] = float((of_many_steps(layer, x, input.samples.level).float() - want).norm() / want.norm())
    return {name: errors[name] for name in layers if name in errors}
