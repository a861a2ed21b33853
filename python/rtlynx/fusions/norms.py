"""diffusers' norms in one kernel of torch's, eager: with their weight, or with the modulation of one sample as if that were a weight.

They have no sparse layer inside: it is the layers around them that are faster, so that what a block does between them counts. diffusers
writes them as six to eight passes over the hidden states, which torch.compile merges; where it does, nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import normalization
from torch import Tensor, nn

from rtlynx.fusions import fusion
from rtlynx.fusions.fusion import plain

_rms_norm = normalization.RMSNorm.forward  # of the class itself torch.compile would not trace it
_zero = normalization.AdaLayerNormZero.forward
_zero_single = normalization.AdaLayerNormZeroSingle.forward


def one_kernel(x: Tensor) -> bool:
    """Whether torch has a kernel for a whole norm of x, and runs it."""
    return fusion.eager(x)


class RMSNorm(normalization.RMSNorm):
    """With its weight, multiplied before the result is rounded once."""

    unfused = normalization.RMSNorm
    has_layers = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As diffusers has it."""
        weight = self.weight
        if weight is None or self.bias is not None or weight.dtype != hidden_states.dtype or not one_kernel(hidden_states):
            return _rms_norm(self, hidden_states)  # type: ignore[no-any-return]
        return F.rms_norm(hidden_states, self.dim, weight, self.eps)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """FLUX.1's and others' double-stream blocks, when they see one sample."""

    unfused = normalization.AdaLayerNormZero
    has_layers = False
    written_for = "emb linear silu chunk norm"

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Any = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As diffusers has it."""
        if self.emb is not None or not _modulates_one(x, self.norm):
            return _zero(self, x, timestep, class_labels, hidden_dtype, emb)  # type: ignore[no-any-return]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return _modulated(x, self.norm, scale, shift), gate, shift_mlp, scale_mlp, gate_mlp


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    """The same of single-stream blocks."""

    unfused = normalization.AdaLayerNormZeroSingle
    has_layers = False
    written_for = "linear silu chunk norm"

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As diffusers has it."""
        if not _modulates_one(x, self.norm):
            return _zero_single(self, x, emb)  # type: ignore[no-any-return]
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return _modulated(x, self.norm, scale, shift), gate


def modulated(x: Tensor, norm: nn.Module, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, in one kernel where there is one sample.

    Args:
        x: ``(B, S, C)``.
        norm: Over C.
        scale, shift: ``(B, C)``.
    """
    if _modulates_one(x, norm):
        return _modulated(x, norm, scale, shift)  # type: ignore[arg-type]
    return norm(x) * (1 + scale[:, None]) + shift[:, None]  # type: ignore[no-any-return]


def _modulates_one(x: Tensor, norm: nn.Module) -> bool:
    return x.dim() == 3 and len(x) == 1 and plain(norm, nn.LayerNorm) and norm.weight is None and one_kernel(x)


def _modulated(x: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, rounded once."""
    return F.layer_norm(x, norm.normalized_shape, 1 + scale[0], shift[0], norm.eps)
