"""`Selection`: how one input is selected from, and the pieces that selection cuts it into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rtlynx import reference

Piece = Literal["whole", "kept", "dropped", "missed"]
PIECES: tuple[Piece, ...] = get_args(Piece)


@dataclass(frozen=True)
class Selection:
    """What selection reads beside X. Channels are first gathered by the permutation; shift and score are in the gathered order.

    Attributes:
        permutation: ``(K,)`` int64: channel j of the selected input is channel ``permutation[j]`` of X; None: as they come.
        shift: ``(K,)`` float32, subtracted first; None: 0.
        score: ``(K,)`` float32 factor on the magnitudes that are compared; None: 1.
        norm_compensation: Whether kept channels are rescaled to the token's norm.
    """

    permutation: Tensor | None = None
    shift: Tensor | None = None
    score: Tensor | None = None
    norm_compensation: bool = True

    def gather(self, channels: Tensor) -> Tensor:
        """The last dimension of an input or a weight in the order selection reads it."""
        return channels if self.permutation is None else channels.index_select(-1, self.permutation.to(channels.device))

    def pieces(self, x: Tensor) -> dict[Piece, Tensor]:
        """Cut tokens ``(T, K)`` into float32 pieces of the same shape.

        ``whole`` is the gathered and shifted X', ``kept`` is ``s·S(X')`` as the sparse product reads it, ``missed`` what it therefore
        lacks, ``X' - s·S(X')``, and ``dropped`` what split's branch reads, ``X' - S(X')``.
        """
        shifted = reference.shifted(self.gather(x), self.shift)
        mask = reference.keep_mask(shifted, self.score)
        whole = shifted.float()
        kept = whole.where(mask, 0)
        dropped = whole - kept
        if not self.norm_compensation:
            return {"whole": whole, "kept": kept, "dropped": dropped, "missed": dropped}
        scale = (whole.square().sum(1) / (kept.square().sum(1) + reference.EPS)).sqrt()
        kept = kept * scale[:, None]
        return {"whole": whole, "kept": kept, "dropped": dropped, "missed": whole - kept}

    def loss(self, x: Tensor, weight_norm: Tensor) -> Tensor:
        """``Σj ‖w_j‖² mean (dropped_j)²``, a stand-in for the output error: what the options below lower. One number, on x's device.

        Args:
            x: ``(T, K)``.
            weight_norm: ``(K,)``, ``‖W_:j‖`` in X's order.
        """
        shifted = reference.shifted(self.gather(x), self.shift)
        dropped = shifted.float().masked_fill(reference.keep_mask(shifted, self.score), 0)
        return (dropped.square().mean(0) * self.gather(weight_norm).square()).sum()


def weight_norms(weights: list[Tensor]) -> Tensor:
    """``(K,)`` float32: the norm of every column of the stacked weights of the layers that read one input."""
    squares = [torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float32).square() for weight in weights]
    return torch.stack(squares).sum(0).sqrt()
