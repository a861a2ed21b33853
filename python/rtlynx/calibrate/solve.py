"""The closed form of the branch: reduced-rank regression of what the sparse product misses on what the branch reads.

Over calibration tokens, with Z what the branch reads and E what the sparse product misses (both tokens × K), find the C (K × N) of
rank r that minimises

    mean ‖E Wᵀ - Z C‖²  =  ‖L⁻¹ Σze Wᵀ - Lᵀ C‖² + (what does not depend on C),     L Lᵀ = Σzz = mean zᵀz,  Σze = mean zᵀe.

The best Lᵀ C of rank r is the truncated SVD, so

    C = L⁻ᵀ [L⁻¹ Σze Wᵀ]_r.

With Z = X this is the optimum of the paper's LoRA. With Z = X - S(X), what selection dropped, it is split; without norm compensation
Z = E, Σze = Σzz, and it becomes C = L⁻ᵀ [Lᵀ Wᵀ]_r.

A ridge, λ‖C‖² added to the error, puts λ on the diagonal of Σzz. Directions of Z that calibration hardly saw need it with Z = X, where C
would fit their noise; split is indifferent to it, since its C never leaves Wᵀ far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rtlynx.reference import RANK_MULTIPLE

RIDGE = 1e-2
"""λ relative to the mean of Σzz's diagonal.

On the demo's model (CPU, rank 16, fitted on 16 prompts × 4 steps, velocity error over 8 steps of 8 other prompts, one run) the paper's form
has 26.5 % at 1e-6, 21.6 % at 1e-3, 19.8 % at 1e-2 and 19.0 % at 1e-1; split has 15.0, 15.0, 14.9 and 15.1 %.
"""
FEW_TOKENS_RIDGE = 1e-1
"""The same when Σzz was measured on so few tokens that its small directions are noise."""

_OVERSAMPLING = 32
_POWER_ITERATIONS = 4
_EXACT_UP_TO = 512


class Factors(NamedTuple):
    """The factors of ``C = comp_downᵀ · comp_upᵀ``: comp_down ``(r, K)``, comp_up ``(N, r)``, float64."""

    comp_down: Tensor
    comp_up: Tensor


def fitting_rank(rank: int, in_features: int, out_features: int) -> int:
    """The largest allowed rank that is neither above ``rank`` nor above what a K × N matrix can have."""
    return min(rank, in_features, out_features) // RANK_MULTIPLE * RANK_MULTIPLE


def fit_branch(zz: Tensor, ze: Tensor | None, weight: Tensor, rank: int, ridge: float = RIDGE) -> Factors:
    """The rank-``rank`` branch that minimises the expected squared output error. See the module's docstring.

    Args:
        zz: ``(K, K)`` mean of zᵀz.
        ze: ``(K, K)`` mean of zᵀe; None where e is z (split without norm compensation).
        weight: ``(N, K)``.
        rank: r ≤ min(K, N).
        ridge: λ relative to the mean of ``zz``'s diagonal.

    Returns:
        The factors, each component's two vectors scaled to the same length, largest component first.
    """
    zz, wt = zz.double(), weight.detach().to(zz.device, torch.float64).T
    scale = float(zz.diagonal().mean())
    if scale == 0:  # the branch reads nothing but zeros
        return Factors(zz.new_zeros(rank, zz.shape[0]), zz.new_zeros(wt.shape[1], rank))
    factor = _cholesky(zz, scale * ridge)
    target = factor.T @ wt if ze is None else torch.linalg.solve_triangular(factor, ze.double() @ wt, upper=False)
    left, right = low_rank(target, rank)
    down = torch.linalg.solve_triangular(factor.T, left, upper=True).T  # (r, K)
    # C fixes only the product of the two; equal lengths keep both, and the activations between them, in the range of half precision.
    tiny = torch.finfo(torch.float64).tiny
    balance = (right.norm(dim=1) / down.norm(dim=1).clamp_min(tiny)).sqrt().clamp_min(tiny)[:, None]
    return Factors(down * balance, (right / balance).T)


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


def _cholesky(zz: Tensor, ridge: float) -> Tensor:
    """Lower factor of ``zz + ridge·I``; rounding can leave the float32 sums slightly indefinite, so the ridge grows until it works."""
    for _ in range(12):
        ridged = zz.clone()
        ridged.diagonal().add_(ridge)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:
            return factor
        ridge *= 10
    raise AssertionError("a finite second-moment matrix with a ridge above its largest entry is positive definite")
