"""Bias groups: a fitted bias for every part of the way from noise to picture (``rtlynx.calibrate(..., bias=4)``).

What selection loses has a mean that drifts while a picture emerges. The way is split into G parts of equal length in noise level, as the
recipe's `Clock` tells it, from noise (group 0) to picture, and a layer's `comp_bias` is ``(G, N)``: one row per group.

A hook on the model finds the group before it runs and writes it, in place, into one tensor that all its layers index their biases with. It
is computed where the timestep is: nothing waits for the device, compiled graphs read it as an input, and a captured CUDA graph finds
the row of the step it is replayed for, since the hook is captured too. The tensor is no buffer: offloading does not move it, and no
state dict holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.dense_steps import check_time, noise_levels
from rtlynx.eligibility import sparse_layers
from rtlynx.linear import SparseLinear

_HOOK, _LOAD_HOOK, _NOW = "rtlynx_bias_groups", "rtlynx_bias_groups_loaded", "rtlynx_bias_group_now"
"""Attributes of the model: its hooks' handles, and number of groups → the tensor that says which one it is."""


def group_of(noise_level: Tensor, groups: int) -> Tensor:
    """The group, 0 to ``groups - 1``, that steps at these noise levels (1: noise, 0: picture) are in: int64, the same shape and device."""
    return ((1 - noise_level) * groups).floor().clamp(0, groups - 1).long()


def install_bias_groups(root: nn.Module) -> None:
    """Let the layers of ``root`` that have a bias per group read that of the present step; without such layers, take the hook away.

    Call it when layers or their compensations changed; loading a state dict into ``root`` does by itself from then on.

    Raises:
        InvalidArgumentError: There are such layers, and the model's forward does not take the argument its recipe reads the time from.
    """
    layers = [layer for layer in sparse_layers(root).values() if layer.bias_groups > 1]
    if layers:
        check_time(root, "a bias per group of timesteps")
    remove_bias_groups(root)
    root.__dict__[_LOAD_HOOK] = root.register_load_state_dict_post_hook(_after_loading)
    if layers:
        root.__dict__[_NOW] = {}
        _share(root, {layer.bias_groups for layer in layers}, layers[0].weight.device)
        root.__dict__[_HOOK] = root.register_forward_pre_hook(_before_step, with_kwargs=True)


def remove_bias_groups(root: nn.Module) -> None:
    """Undo `install_bias_groups`."""
    for name in (_HOOK, _LOAD_HOOK):
        handle = root.__dict__.pop(name, None)
        if handle is not None:
            handle.remove()
    root.__dict__.pop(_NOW, None)


def of_many_steps(layer: SparseLinear, x: Tensor, noise_level: Tensor | None) -> Tensor:
    """What a layer answers to tokens of many steps, each with the bias of its own step.

    Args:
        layer: A sparse layer, with or without groups.
        x: ``(T, K)``.
        noise_level: ``(T,)``, of the step each token was read in; not needed for a layer without groups.
    """
    if layer.bias_groups <= 1 or noise_level is None:
        output: Tensor = layer(x)
        return output
    group = group_of(noise_level, layer.bias_groups).to(x.device)
    before, output = layer.bias_group, x.new_empty(len(x), layer.out_features)
    try:
        for mine in group.unique():
            layer.bias_group = mine.view(1)
            output[group == mine] = layer(x[group == mine])
    finally:
        layer.bias_group = before
    return output


def _after_loading(root: nn.Module, incompatible_keys: object) -> None:
    install_bias_groups(root)


# Inside of compiled graphs, the write to what they read would keep CUDA graphs from being used for them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    levels = noise_levels(root, args, kwargs)
    if levels is None or levels.is_meta:
        return
    now: dict[int, Tensor] = root.__dict__[_NOW]
    device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), levels.device)
    if any(group.device != device for group in now.values()):
        _share(root, set(now), device)
    for groups, group in now.items():
        group.copy_(group_of(levels.max(), groups))


def _share(root: nn.Module, counts: set[int], device: torch.device) -> None:
    """Give all layers with the same number of groups one new tensor on ``device``."""
    now: dict[int, Tensor] = root.__dict__[_NOW]
    with torch.inference_mode(False):  # made in inference mode, it could not be written to outside of it
        now.update({groups: torch.zeros(1, dtype=torch.int64, device="cpu" if device.type == "meta" else device) for groups in counts})
    for layer in sparse_layers(root).values():
        if layer.bias_groups in now:
            layer.bias_group = now[layer.bias_groups]
