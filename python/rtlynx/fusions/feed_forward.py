"""diffusers' common feed-forward: FLUX.1's double-stream blocks, Qwen-Image, Wan, SD3.5, PixArt, LTX, HunyuanVideo and many more."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import activations, attention
from torch import Tensor, nn

from rtlynx.fusions.fusion import Fusion, add_gated, gelu_named, inactive, plain
from rtlynx.linear import SparseLinear
from rtlynx.reference import Activation

_forward = attention.FeedForward.forward  # of the class itself torch.compile would not trace it


class FeedForward(attention.FeedForward):
    """``net = [projection with activation, dropout, linear]``, then perhaps another dropout; GELU and SwiGLU are fused."""

    unfused = attention.FeedForward

    def fusion(self) -> Fusion | None:
        """What the last linear takes in now; None where nothing."""
        first, dropout, last, *_ = self.net
        activation = _activation(first)
        if activation is None or not inactive(dropout) or not plain(last, SparseLinear):
            return None
        return Fusion(last, activation)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As diffusers has it."""
        fusion = None if args or kwargs or _was_dense(self, hidden_states) else FeedForward.fusion(self)
        if fusion is None or not fusion.pays(hidden_states.shape[:-1].numel(), hidden_states.device):
            return _forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        first, _, _, *others = self.net  # a slice of it would be a module of its own, which takes as long to make as two launches
        output = _activated_output(first, fusion, hidden_states)
        for module in others:
            output = module(output)
        return output


def add_gated_output(residual: Tensor, gate: Tensor, ff: Any, x: Tensor) -> Tensor:
    """``residual + gate * ff(x)``, by the last product of ``ff`` where that takes in its activation too.

    Args:
        residual: ``(B, S, C)``.
        gate: See `add_gated`; the product takes that of a sample, in the dtype of the residual.
        ff: A feed-forward of a model with fusions, diffusers' or another.
        x: ``(B, S, C)``.
    """
    fusion: Fusion | None = ff.fusion() if plain(ff, FeedForward) and not _was_dense(ff, x) else None
    if fusion is None or gate.dim() != 2 or not fusion.pays(x.shape[:-1].numel(), x.device):
        return add_gated(residual, gate, ff(x))
    first, _, _, *others = ff.net
    if not all(map(inactive, others)):
        return add_gated(residual, gate, ff(x))
    return _activated_output(first, fusion, x, residual, gate.type_as(residual))


def _activated_output(
    first: Any, fusion: Fusion, hidden_states: Tensor, residual: Tensor | None = None, residual_gate: Tensor | None = None
) -> Tensor:
    """Both linears, and what the second one takes in before it and after it."""
    x, gate = first.proj(hidden_states), None
    if fusion.activation == "silu_gate":
        gate, x = x.chunk(2, dim=-1)
    return fusion.layer.select_activated(x, fusion.activation, gate, residual=residual, residual_gate=residual_gate)


def _was_dense(ff: Any, x: Tensor) -> bool:
    """Whether an eager call of the last linear with as many tokens as x has is known to be dense, so that nothing else has to be asked."""
    if torch.compiler.is_compiling():
        return False
    _, _, last, *_ = ff.net
    return type(last) is SparseLinear and last.was_dense(x)


def _activation(first: nn.Module) -> Activation | None:
    """What the first of the net does after its projection, if sparsify can do it."""
    if plain(first, activations.GELU):
        return gelu_named(first.approximate)  # type: ignore[arg-type]
    if plain(first, activations.SwiGLU) and plain(first.activation, nn.SiLU):  # type: ignore[arg-type]
        return "silu_gate"
    return None
