"""`Moments`: mean products of the pieces that selection cuts an input into, computed when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rtlynx.calibrate.factor import Factor
from rtlynx.calibrate.selection.vectors import PIECES, Piece, Selection

_CHUNK_ELEMENTS = 1 << 26  # of one piece: a quarter of a gigabyte in float32


class Moments:
    """Second moments over the sampled tokens of one input, shared by all layers that read it.

    Args:
        x: ``(T, K)`` samples, anywhere.
        selection: How they are selected from.
        centred: Whether means are subtracted, as they are when a bias is fitted too.
        device: Where to compute.
        group: ``(T,)`` int64, for each token the number of its group, from 0 on: every group has means of its own. None: one for all.
        groups: How many there are. One without tokens takes the means of the nearest that has some, the earlier of two.
    """

    def __init__(
        self, x: Tensor, selection: Selection, centred: bool, device: torch.device, group: Tensor | None = None, groups: int = 1
    ) -> None:
        self.x, self.selection, self.centred, self.device, self.groups = x, selection, centred, device, groups
        self.group = torch.zeros(len(x), dtype=torch.int64, device=device) if group is None else group.to(device)
        self._products: dict[tuple[Piece, Piece], Tensor] = {}
        self._means: dict[Piece, Tensor] | None = None
        self._factors: dict[tuple[Piece, float], Factor] = {}

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    def chunks(self) -> Iterator[dict[Piece, Tensor]]:
        """The pieces of all tokens, some thousand tokens at a time."""
        for part in self.x.split(self._chunk):
            yield self.selection.pieces(part.to(self.device))

    def deviations(self, *wanted: Piece) -> Iterator[tuple[Tensor, ...]]:
        """Some of the pieces, less their means, if centred; float32."""
        means = [self.mean(piece).float() for piece in wanted] if self.centred else []
        for group, pieces in zip(self.group.split(self._chunk), self.chunks(), strict=True):
            if self.centred:
                rows = slice(None) if self.groups == 1 else group
                yield tuple(pieces[piece] - mean[rows] for piece, mean in zip(wanted, means, strict=True))
            else:
                yield tuple(pieces[piece] for piece in wanted)

    @property
    def _chunk(self) -> int:
        return max(1, _CHUNK_ELEMENTS // self.x.shape[1])

    def mean(self, piece: Piece) -> Tensor:
        """``(groups, K)`` float64: its mean over the tokens of each group; zeros unless centred."""
        if self._means is None:
            shape = self.groups, self.x.shape[1]
            totals = {each: torch.zeros(shape, dtype=torch.float64, device=self.device) for each in PIECES}
            if self.centred:
                for group, pieces in zip(self.group.split(self._chunk), self.chunks(), strict=True):
                    for number in range(self.groups):
                        rows = slice(None) if self.groups == 1 else group == number
                        for each, total in totals.items():
                            total[number] += pieces[each][rows].sum(0, dtype=torch.float64)
            count = self.group.bincount(minlength=self.groups)
            nearest = _nearest_filled(count)
            self._means = {each: (total / count.clamp_min(1)[:, None])[nearest] for each, total in totals.items()}
        return self._means[piece]

    def product(self, a: Piece, b: Piece) -> Tensor:
        """``(K, K)`` float32: mean of ``aᵀb`` over tokens, both less their groups' means if that was asked for."""
        if (b, a) in self._products:
            return self._products[b, a].T
        if (a, b) not in self._products:
            total = torch.zeros(self.x.shape[1], self.x.shape[1], device=self.device)
            with full_precision():
                for left, right in self.deviations(a, b):
                    total.addmm_(left.T, right)
            self._products[a, b] = total.div_(self.tokens)
        return self._products[a, b]

    def factor(self, piece: Piece, ridge: float) -> Factor:
        """Cholesky factor of the piece's own second moment with a ridge of ``ridge`` times its mean diagonal."""
        if (piece, ridge) not in self._factors:
            self._factors[piece, ridge] = Factor.of(self.product(piece, piece), ridge)
        return self._factors[piece, ridge]


def _nearest_filled(count: Tensor) -> Tensor:
    """For every group itself, or the nearest one with tokens: int64 as long as ``count``."""
    filled = count.nonzero()[:, 0]
    if not len(filled):
        return torch.arange(len(count), device=count.device)
    distance = (torch.arange(len(count), device=count.device)[:, None] - filled).abs()
    return filled[distance.argmin(1)]


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32, whatever the user chose: sums of squares over thousands of tokens need the bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
