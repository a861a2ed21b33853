"""`Moments`: mean products of the pieces that selection cuts an input into, computed when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rtlynx.calibrate.factor import Factor
from rtlynx.calibrate.selection.vectors import Piece, Selection

_CHUNK_ELEMENTS = 1 << 26  # of one piece: a quarter of a gigabyte in float32


class Moments:
    """Second moments over the sampled tokens of one input, shared by all layers that read it.

    Args:
        x: ``(T, K)`` samples, anywhere.
        selection: How they are selected from.
        centred: Whether means are subtracted, as they are when a bias is fitted too.
        device: Where to compute.
    """

    def __init__(self, x: Tensor, selection: Selection, centred: bool, device: torch.device) -> None:
        self.x, self.selection, self.centred, self.device = x, selection, centred, device
        self._products: dict[tuple[Piece, Piece], Tensor] = {}
        self._means: dict[Piece, Tensor] = {}
        self._factors: dict[tuple[Piece, float], Factor] = {}

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    def chunks(self) -> Iterator[dict[Piece, Tensor]]:
        """The pieces of all tokens, some thousand tokens at a time."""
        for part in self.x.split(max(1, _CHUNK_ELEMENTS // self.x.shape[1])):
            yield self.selection.pieces(part.to(self.device))

    def mean(self, piece: Piece) -> Tensor:
        """``(K,)`` float64: its mean over tokens; zeros unless centred."""
        if piece not in self._means:
            total = torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.device)
            if self.centred:
                for pieces in self.chunks():
                    total += pieces[piece].sum(0, dtype=torch.float64)
            self._means[piece] = total / self.tokens
        return self._means[piece]

    def product(self, a: Piece, b: Piece) -> Tensor:
        """``(K, K)`` float32: mean of ``aᵀb`` over tokens, both centred if that was asked for."""
        if (b, a) in self._products:
            return self._products[b, a].T
        if (a, b) not in self._products:
            mean_a, mean_b = self.mean(a).float(), self.mean(b).float()
            total = torch.zeros(self.x.shape[1], self.x.shape[1], device=self.device)
            with full_precision():
                for pieces in self.chunks():
                    left, right = pieces[a] - mean_a, pieces[b] - mean_b
                    total.addmm_(left.T, right)
            self._products[a, b] = total.div_(self.tokens)
        return self._products[a, b]

    def factor(self, piece: Piece, ridge: float) -> Factor:
        """Cholesky factor of the piece's own second moment with a ridge of ``ridge`` times its mean diagonal."""
        if (piece, ridge) not in self._factors:
            self._factors[piece, ridge] = Factor.of(self.product(piece, piece), ridge)
        return self._factors[piece, ridge]


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32, whatever the user chose: sums of squares over thousands of tokens need the bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
