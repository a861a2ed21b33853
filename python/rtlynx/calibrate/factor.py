"""The linear algebra of the closed forms: a robust Cholesky factor, the best approximation of low rank, and the branch made of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx.reference import RANK_MULTIPLE

_OVERSAMPLING = 32
_POWER_ITERATIONS = 4
_EXACT_UP_TO = 512


class Branch(NamedTuple):
    """The factors of ``C = down · upᵀ``: down ``(K, r)``, up ``(N, r)``."""

    down: Tensor
    up: Tensor


def padded(factor: Tensor) -> Tensor:
    """A factor with columns of zeros up to a rank that the kernels take."""
    return F.pad(factor, (0, -factor.shape[1] % RANK_MULTIPLE))


@dataclass(frozen=True)
class Factor:
    """``L`` with ``L Lᵀ = Σ + ridge``, lower triangular, float64; ``zero`` marks a Σ without anything in it."""

    lower: Tensor
    zero: bool

    @classmethod
    def of(cls, moment: Tensor, ridge: float) -> Factor:
        """Factor ``(K, K)`` with ``ridge`` times its mean diagonal added; more where rounding left the sums slightly indefinite."""
        moment = moment.double()
        scale = float(moment.diagonal().mean())
        if scale <= 0:
            return cls(torch.eye(len(moment), dtype=torch.float64, device=moment.device), True)
        for growth in range(12):
            ridged = moment.clone()
            ridged.diagonal().add_(scale * ridge * 10**growth)
            lower, failed = torch.linalg.cholesky_ex(ridged)
            if not failed:
                return cls(lower, False)
        raise AssertionError("a finite second moment with a ridge above its largest entry is positive definite")

    def whiten(self, b: Tensor) -> Tensor:
        """``L⁻¹ b``."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower, b, upper=False)
        return solved

    def unwhiten(self, b: Tensor) -> Tensor:
        """``L⁻ᵀ b``."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower.T, b, upper=True)
        return solved

    def solve(self, b: Tensor) -> Tensor:
        """``(Σ + ridge)⁻¹ b``."""
        return torch.cholesky_solve(b, self.lower)

    def branch(self, zt: Tensor, rank: int) -> Branch:
        """The C of rank ``rank`` that minimises ``mean ‖t - z C‖²``, where Σ is ``mean zᵀz`` and ``zt`` is ``mean zᵀt``, ``(K, N)``.

        The error is ``‖L⁻¹ Σzt - Lᵀ C‖²`` and a term without C, so ``C = L⁻ᵀ [L⁻¹ Σzt]_r``. C fixes only the product of the factors; each
        component's two vectors get the same length, which keeps both, and the activations between them, in the range of half precision.
        """
        if self.zero:
            return Branch(zt.new_zeros(zt.shape[0], rank), zt.new_zeros(zt.shape[1], rank))
        left, right = low_rank(self.whiten(zt), rank)
        down = self.unwhiten(left)
        tiny = torch.finfo(torch.float64).tiny
        balance = (right.norm(dim=1) / down.norm(dim=0).clamp_min(tiny)).sqrt().clamp_min(tiny)
        return Branch(down * balance, right.T / balance)


def low_rank(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation ``left @ right`` of ``a``: ``(K, r)`` and ``(r, N)``, largest component first.

    Projecting on the leading singular vectors of one side gives it, and these are eigenvectors of the smaller Gram matrix. Large matrices
    are first projected on a subspace found by randomized power iteration (Halko, Martinsson, Tropp 2011), with a seed of its own.
    """
    if min(a.shape) > max(_EXACT_UP_TO, rank + _OVERSAMPLING):
        generator = torch.Generator(a.device).manual_seed(0)
        basis = torch.randn(a.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=a.dtype, device=a.device)
        basis = torch.linalg.qr(a @ basis).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(a @ torch.linalg.qr(a.T @ basis).Q).Q
        left, right = low_rank(basis.T @ a, rank)
        return basis @ left, right
    if a.shape[0] > a.shape[1]:
        right, left = low_rank(a.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(a @ a.T).eigenvectors[:, -rank:].flip(1)
    return vectors, vectors.T @ a
