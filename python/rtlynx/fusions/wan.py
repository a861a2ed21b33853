"""Wan's block: what it does in float32, without a float32 copy of the hidden states for each step of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from rtlynx.autocast import autocast_dtype
from rtlynx.fusions import feed_forward, fusion, wan_attention
from rtlynx.fusions.fusion import add_gated, add_projected, plain
from rtlynx.fusions.known import known_to_hooks

_forward = transformer_wan.WanTransformerBlock.forward  # of the class itself torch.compile would not trace it


class WanTransformerBlock(transformer_wan.WanTransformerBlock):
    """Eager, without gradients: norms modulated, residuals added, and queries and keys rotated, in fewer passes.

    Modulations and gates are float32 whatever the model's dtype, and stay it in the passes that take them; only a product that adds to the
    residual takes its gate in the model's dtype. There may be one modulation of each sample or one of each token (Wan 2.2's 5B model).
    """

    unfused = transformer_wan.WanTransformerBlock
    has_layers = False
    written_for = "ndim scale_shift_table unsqueeze float chunk squeeze norm1 type_as attn1 norm2 attn2 norm3 ffn"

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        """As diffusers has it."""
        ready = fusion.eager(hidden_states) and not torch.is_grad_enabled() and autocast_dtype(hidden_states.device) is None
        if not ready:
            return _forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)  # type: ignore[no-any-return]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.scale_shift_table + temb.float()).unbind(-2)

        x = hidden_states.contiguous()  # older versions of diffusers give the first block a transposed one, and sums would leave it that
        x = _add_attended(x, gate, self.attn1, _modulated(x, self.norm1, scale, shift), None, rotary_emb)
        x = _add_attended(x, None, self.attn2, _affine(x, self.norm2), encoder_hidden_states, None)
        return feed_forward.add_gated_output(x, gate_ff, self.ffn, _modulated(x, self.norm3, scale_ff, shift_ff))


def _add_attended(
    residual: Tensor, gate: Tensor | None, attention: Any, x: Tensor, text: Tensor | None, embedding: tuple[Tensor, Tensor] | None
) -> Tensor:
    """``residual + gate * attention(x, text, None, embedding)``.

    Args:
        residual, x: ``(B, S, C)``.
        gate: float32 ``(B, C)`` or ``(B, S, C)``; None: 1.
        attention: A block's.
        text: ``(B, t, C)``, that of an image before it; None for self-attention.
        embedding: Of self-attention.
    """
    if plain(attention, wan_attention.WanAttention) and wan_attention.is_written_here(attention, x, embedding):
        attended = wan_attention.attended(attention, x, text, None, embedding)
        return add_projected(residual, gate, attended, *attention.to_out)
    update = attention(x, text, None, embedding)
    return residual + update if gate is None else add_gated(residual, gate, update)


def _modulated(x: Tensor, norm: Any, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, of x's dtype: the norm is one pass, its modulation in float32 another.

    Args:
        x: ``(B, S, C)``.
        norm: Over C.
        scale, shift: float32 ``(B, C)`` or ``(B, S, C)``.
    """
    known = plain(norm, FP32LayerNorm) and norm.weight is None
    normed = F.layer_norm(x, norm.normalized_shape, eps=norm.eps) if known else norm(x.float())
    if scale.dim() == 2:
        scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
    return _multiplied(normed, 1 + scale, shift, x)


def _affine(x: Tensor, norm: Any) -> Tensor:
    """``norm(x)`` with weight and bias of its own, of x's dtype: one pass where they are of that too, two where they are float32."""
    if not plain(norm, FP32LayerNorm) or norm.weight is None or norm.bias is None:
        return norm(x.float()).type_as(x)  # type: ignore[no-any-return]
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    if weight.dtype == bias.dtype == x.dtype:
        return F.layer_norm(x, shape, weight, bias, eps)
    return _multiplied(F.layer_norm(x, shape, eps=eps), weight, bias, x)


def _multiplied(normed: Tensor, weight: Tensor, bias: Tensor, like: Tensor) -> Tensor:
    """``normed * weight + bias``, computed in the widest of their dtypes and rounded once, to that of ``like``."""
    return torch.addcmul(bias, normed, weight, out=torch.empty_like(like))


known_to_hooks(WanTransformerBlock)
