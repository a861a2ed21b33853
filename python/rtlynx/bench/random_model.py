"""Full-size models without a download: the released architecture with random weights, and variants of it that share them."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from rtlynx.bench.models import BenchModel
from rtlynx.eligibility import sparse_layers
from rtlynx.errors import InvalidArgumentError


@torch.no_grad()
def build(model: BenchModel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The architecture on ``device``, weights drawn there; nothing of its size is ever made on the host.

    Raises:
        InvalidArgumentError: accelerate is not installed.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise InvalidArgumentError("bench model", "accelerate", "none installed", "one: it makes models without their weights") from error
    with init_empty_weights(include_buffers=False):  # what a model computes for itself, such as tables of angles, it keeps
        module = getattr(diffusers, model.cls)(**model.config)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
                part._parameters[name] = nn.Parameter(_drawn(value, name), requires_grad=False)
    return module.to(device).eval()


def _drawn(value: Tensor, name: str) -> Tensor:
    """Values that keep activations in range through many blocks: matrices scaled by their width, gains one, biases zero."""
    if value.dim() > 1:
        return value.normal_(std=1 / math.sqrt(value[0].numel()))
    return value.fill_(1) if name == "weight" else value.zero_()


def variant(module: nn.Module) -> Any:
    """Another model of the same structure that holds the same parameters and buffers."""
    held = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in held})


@torch.no_grad()
def random_compensation(module: nn.Module, rank: int) -> None:
    """Give every sparse layer a branch and a shift as calibration does, drawn at random: layers that share an input share what reads it."""
    of_input: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in sparse_layers(module).values():
        k, n = layer.in_features, layer.out_features
        owner = id(layer if layer.input_group is None else layer.input_group)
        if owner not in of_input:
            of_input[owner] = layer.weight.new_empty(k, rank).normal_(std=1 / math.sqrt(k)), layer.weight.new_empty(k).normal_(std=0.1)
        down, shift = of_input[owner]
        layer.set_compensation(down, layer.weight.new_empty(n, rank).normal_(std=0.1 / math.sqrt(rank)), shift)
