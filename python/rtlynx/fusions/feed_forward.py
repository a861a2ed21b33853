"""diffusers' common feed-forward: FLUX.1's double-stream blocks, Qwen-Image, Wan, SD3.5, PixArt, LTX, HunyuanVideo and many more."""

from __future__ import annotations

from typing import Any

from diffusers.models import activations, attention
from torch import Tensor, nn

from rtlynx.fusions.fusion import Fusion, gelu_named, inactive, plain
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
        fusion = None if args or kwargs else FeedForward.fusion(self)
        if fusion is None or not fusion.pays(hidden_states.shape[:-1].numel(), hidden_states.device):
            return _forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        first, _, last, *final = self.net
        x, gate = first.proj(hidden_states), None
        if fusion.activation == "silu_gate":
            gate, x = x.chunk(2, dim=-1)
        output = last.select_activated(x, fusion.activation, gate)
        for module in final:
            output = module(output)
        return output  # type: ignore[no-any-return]


def _activation(first: nn.Module) -> Activation | None:
    """What the first of the net does after its projection, if sparsify can do it."""
    if plain(first, activations.GELU):
        return gelu_named(first.approximate)  # type: ignore[arg-type]
    if plain(first, activations.SwiGLU) and plain(first.activation, nn.SiLU):  # type: ignore[arg-type]
        return "silu_gate"
    return None
