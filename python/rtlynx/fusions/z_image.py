"""Z-Image's feed-forward: ``w2(silu(w1 x) · w3 x)``."""

from __future__ import annotations

from diffusers.models.transformers import transformer_z_image
from torch import Tensor

from rtlynx.fusions.fusion import Fusion, plain
from rtlynx.linear import SparseLinear

_forward = transformer_z_image.FeedForward.forward  # of the class itself torch.compile would not trace it


class FeedForward(transformer_z_image.FeedForward):
    """With the gated activation in ``w2``."""

    unfused = transformer_z_image.FeedForward

    def fusion(self) -> Fusion | None:
        """What ``w2`` takes in now; None where nothing."""
        w2 = self.w2
        return Fusion(w2, "silu_gate") if plain(w2, SparseLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """As diffusers has it."""
        fusion = FeedForward.fusion(self)
        if fusion is None or not fusion.pays(x.shape[:-1].numel(), x.device):
            return _forward(self, x)  # type: ignore[no-any-return]
        return fusion.layer.select_activated(self.w1(x), "silu_gate", self.w3(x))
