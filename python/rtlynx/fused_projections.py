"""``fuse_qkv_projections()`` keeps sparse layers sparse.

diffusers fuses the projections of an attention module by building a plain ``nn.Linear`` from their weights. The fused layer of sparse ones
is made sparse with what they hold: the same selection, their branches' outputs side by side.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.adaln_shift import follow_adaln_shift
from rtlynx.compacted import refuse_compact
from rtlynx.layer_state import same_selection
from rtlynx.linear import SparseLinear
from rtlynx.reference import MAX_RANK

logger = logging.getLogger("rtlynx")

_PARTS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Fused layer of a diffusers attention module → the layers it stands for, in the order of their rows."""


def parts_of(name: str) -> list[str]:
    """The layers a layer stands for, if its name is that of a fused one."""
    parent, _, last = f".{name}".rpartition(".")
    return [f"{parent}.{part}".removeprefix(".") for part in _PARTS.get(last, ())]


def keep_fused_sparse(root: nn.Module) -> None:
    """From now on the attention classes in ``root`` fuse sparse layers to a sparse one; what they do with others stays the same."""
    for cls in {owner for module in root.modules() for owner in type(module).__mro__}:
        fuse = vars(cls).get("fuse_projections")
        if fuse is not None and not hasattr(fuse, "_rtlynx"):
            cls.fuse_projections = _then_sparse(fuse)  # type: ignore[attr-defined]


def _then_sparse(fuse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fuse)
    def fuse_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        held = {f"{type(self).__name__}.{part}": layer for parts in _PARTS.values() for part, layer in _sparse_parts(self, parts).items()}
        refuse_compact("fuse_projections", held, "layers that have their weights: fuse before rtlynx.compact")
        result = fuse(self, *args, **kwargs)
        for name, parts in _PARTS.items():
            fused = getattr(self, name, None)
            layers = list(_sparse_parts(self, parts).values())
            if type(fused) is nn.Linear and len(layers) == len(parts):
                setattr(self, name, _sparse(fused, layers, f"{type(self).__name__}.{name}"))
        return result

    fuse_projections._rtlynx = True  # type: ignore[attr-defined]
    return fuse_projections


def _sparse_parts(attention: nn.Module, parts: Sequence[str]) -> dict[str, SparseLinear]:
    """Those of the layers with these names that are sparse."""
    modules = {part: getattr(attention, part, None) for part in parts}
    layers = {part: getattr(module, "base_layer", module) for part, module in modules.items()}  # peft wraps
    return {part: layer for part, layer in layers.items() if isinstance(layer, SparseLinear)}


@torch.no_grad()
def _sparse(fused: nn.Linear, layers: Sequence[SparseLinear], name: str) -> nn.Linear:
    """``fused`` as a sparse layer that computes what ``layers`` do, or as it is, with a log record, where one branch cannot hold theirs."""
    first = layers[0]
    if not all(same_selection(_but_branch(layer), _but_branch(first)) for layer in layers):
        logger.warning("fuse: %s becomes dense: its parts select differently", name)
        return fused
    downs = list({id(layer.comp_down): layer.comp_down for layer in layers if layer.comp_down is not None}.values())
    rank = sum(down.shape[1] for down in downs)
    if rank > MAX_RANK:
        logger.warning("fuse: %s becomes dense: its parts read different branches, of rank %d together", name, rank)
        return fused
    sparse = SparseLinear.from_linear(fused)
    for attribute in ("branch", "selection", "norm_compensation", "small_m", "precision"):
        setattr(sparse, attribute, getattr(first, attribute))
    ups = [torch.cat([_up(layer, down) for down in downs], 1) for layer in layers] if downs else []
    sparse.set_compensation(
        torch.cat([*downs], 1) if downs else None,
        torch.cat(ups) if downs else None,
        first.shift,
        comp_bias=_stacked_biases(layers),
        permutation=first.permutation,
        sparse_weight=_stacked([layer.sparse_weight for layer in layers], [layer.weight for layer in layers]),
        values_scale=first.values_scale,
    )
    sparse.bias_group = next((layer.bias_group for layer in layers if layer.bias_groups > 1), None)
    sparse.set_score(first.score)
    sparse.repeats = True
    follow_adaln_shift(first, sparse)
    if first.input_group is not None:
        first.input_group.join(sparse)
        first.input_group.tie()
    return sparse


def _but_branch(layer: SparseLinear) -> tuple[object, ...]:
    permutation, places, score, shift, _, *others = layer.selection_inputs()
    return permutation, places, score, shift, *others


def _up(layer: SparseLinear, down: Tensor) -> Tensor:
    """What the layer does with the branch that ``down`` feeds: nothing, if it is another layer's."""
    if layer.comp_down is down and layer.comp_up is not None:
        return layer.comp_up
    return layer.weight.new_zeros(layer.out_features, down.shape[1])


def _stacked_biases(layers: Sequence[SparseLinear]) -> Tensor | None:
    """Their compensation biases side by side: ``(N,)``, or ``(G, N)`` if one of them has G groups; None if no layer has one.

    The groups of one model are always the same, whoever calibrated it.
    """
    groups = max(layer.bias_groups for layer in layers)
    held = [None if layer.comp_bias is None else layer.comp_bias.expand(max(1, groups), -1).T for layer in layers]
    stacked = _stacked(held, [layer.weight.new_zeros(layer.out_features, max(1, groups)) for layer in layers])
    return None if stacked is None else stacked.T.contiguous() if groups > 1 else stacked[:, 0]


def _stacked(held: Sequence[Tensor | None], otherwise: Sequence[Tensor]) -> Tensor | None:
    """The tensors on top of each other, ``otherwise`` for a layer that has none; None if no layer has one."""
    if all(tensor is None for tensor in held):
        return None
    return torch.cat([other if tensor is None else tensor for tensor, other in zip(held, otherwise, strict=True)])
