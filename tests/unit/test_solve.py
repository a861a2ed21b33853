"""The closed form of the branch is optimal, robust, and split does what it claims."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtlynx import SparseLinear, SparsityConfig
from rtlynx.calibrate.solve import fit_branch, fitting_rank, low_rank
from rtlynx.calibrate.statistics import LayerStatistics, regressors
from rtlynx.config import Branch

K, N = 64, 96


def activations(tokens: int, seed: int = 0, channels: int = K) -> Tensor:
    """Correlated, heavy-tailed tokens; the same covariance for every seed."""
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, channels)[:, None]
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=rng).pow(3) @ mixing + 0.05 * torch.randn(tokens, channels, generator=rng)


def layer_with(branch: Branch, norm_compensation: bool = True) -> SparseLinear:
    torch.manual_seed(5)
    return SparseLinear.from_linear(nn.Linear(K, N), SparsityConfig(branch=branch, norm_compensation=norm_compensation))


def loss(z: Tensor, e: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (e @ weight.T - z @ down.T @ up.T).square().sum() / len(z)


@pytest.mark.parametrize(("branch", "norm_compensation"), [("input", True), ("dropped", True), ("dropped", False)])
@pytest.mark.parametrize("rank", [16, 48])
def test_no_other_branch_of_this_rank_is_better(branch: Branch, norm_compensation: bool, rank: int) -> None:
    layer = layer_with(branch, norm_compensation)
    z, e = (t.double() for t in regressors(layer, activations(3000), branch))
    w = layer.weight.detach().double()
    zz, ze = z.T @ z / len(z), z.T @ e / len(z)
    down, up = fit_branch(zz, ze if norm_compensation else None, w, rank, ridge=1e-12)
    assert down.shape == (rank, K) and up.shape == (N, rank)
    best = loss(z, e, w, down, up)

    # Neither factor can be improved while the other stays ...
    zt = ze @ w.T
    assert loss(z, e, w, *alternate(zz, zt, down, up)) > best * (1 - 1e-6)
    # ... and alternating least squares from random starts, another solver of the same problem, arrives there and not below.
    for seed in range(2):
        a, b = torch.randn(down.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), up
        for _ in range(60):
            a, b = alternate(zz, zt, a, b)
        assert best * (1 - 1e-6) < loss(z, e, w, a, b) < best * 1.02


def alternate(zz: Tensor, zt: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """One round of alternating least squares on ‖t - z downᵀ upᵀ‖, from zᵀz and zᵀt: first `up`, then `down`."""
    up = torch.linalg.solve(down @ zz @ down.T, down @ zt).T
    down = (torch.linalg.solve(zz, zt) @ torch.linalg.pinv(up.T)).T
    return down, up


@torch.no_grad()
def test_split_and_paper_reduce_held_out_error_and_rank_helps() -> None:
    errors: dict[tuple[str, int], float] = {}
    held_out = activations(2000, seed=1)
    for branch in ("input", "dropped"):
        layer = layer_with(branch)
        want = nn.functional.linear(held_out, layer.weight, layer.bias)
        statistics = LayerStatistics(layer, branch, max_tokens=10**6, seed=0)
        statistics.add(activations(4000))
        statistics.finish()
        for rank in (0, 16, 32, 48):
            if rank:
                layer.set_compensation(*fit_branch(statistics.zz, statistics.ze, layer.weight, rank))
            errors[branch, rank] = float((layer(held_out) - want).norm() / want.norm())
    split = [errors["dropped", rank] for rank in (0, 16, 32, 48)]
    assert split == sorted(split, reverse=True), errors
    assert split[3] < 0.5 * split[0], errors
    assert errors["input", 16] < 0.95 * errors["input", 0], errors
    assert errors["dropped", 32] < errors["input", 32], errors  # the paper's branch gains little from rank


def test_split_of_full_rank_is_the_weight() -> None:
    layer = layer_with("dropped", norm_compensation=False)
    _, e = regressors(layer, activations(3000), "dropped")
    down, up = fit_branch(e.T @ e / len(e), None, layer.weight, K, ridge=1e-12)
    torch.testing.assert_close((down.T @ up.T).float(), layer.weight.detach().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_factors_are_balanced_whatever_the_scale_of_the_activations(scale: float) -> None:
    layer = layer_with("input")
    x, e = regressors(layer, activations(2000) * scale, "input")
    down, up = fit_branch(x.T @ x, x.T @ e, layer.weight, 16)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    assert down.half().isfinite().all() and up.half().isfinite().all()
    product = down.T @ up.T
    torch.testing.assert_close((down.half().double().T @ up.half().double().T), product, rtol=0.02, atol=0.01 * float(product.abs().max()))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_degenerate_statistics_give_a_finite_branch(tokens: int) -> None:
    layer = layer_with("input")
    x, e = regressors(layer, activations(tokens), "input")
    down, up = fit_branch(x.T @ x, x.T @ e, layer.weight, 16)
    assert down.shape == (16, K) and up.shape == (N, 16)
    assert down.isfinite().all() and up.isfinite().all()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (600, 700)])
def test_low_rank_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=rng, dtype=torch.float64) * torch.logspace(0, -4, shape[1], dtype=torch.float64)
    left, right = low_rank(a, 16)
    singular = torch.linalg.svdvals(a)
    torch.testing.assert_close((a - left @ right).norm(), singular[16:].norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(left.norm(dim=0) * right.norm(dim=1), singular[:16], rtol=1e-2, atol=0)


def test_low_rank_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = low_rank(torch.ones(600, 600, dtype=torch.float64), 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], low_rank(torch.ones(600, 600, dtype=torch.float64), 16)[0])


@pytest.mark.parametrize(
    ("rank", "k", "n", "expected"), [(64, 3072, 3072, 64), (64, 64, 40, 32), (64, 64, 8, 0), (128, 192, 72, 64), (16, 64, 64, 16)]
)
def test_fitting_rank(rank: int, k: int, n: int, expected: int) -> None:
    assert fitting_rank(rank, k, n) == expected


@pytest.mark.parametrize(("branch", "norm_compensation"), [("input", True), ("dropped", True), ("dropped", False)])
def test_statistics_do_not_depend_on_how_tokens_arrive(branch: Branch, norm_compensation: bool) -> None:
    layer, x = layer_with(branch, norm_compensation), activations(300)
    at_once, in_calls = (LayerStatistics(layer, branch, max_tokens=1000, seed=0) for _ in range(2))
    at_once.add(x)
    for chunk in x.split(70):
        in_calls.add(chunk[None])  # a batch dimension
    in_calls.add(x[:0])
    at_once.finish()
    in_calls.finish()
    torch.testing.assert_close(at_once.zz, in_calls.zz)
    if norm_compensation:
        assert at_once.ze is not None and in_calls.ze is not None
        torch.testing.assert_close(at_once.ze, in_calls.ze)
    else:
        assert at_once.ze is None


def test_sampling_is_bounded_seeded_and_unbiased() -> None:
    layer, x = layer_with("dropped"), activations(4000)
    everything = LayerStatistics(layer, "dropped", max_tokens=10**6, seed=0)
    everything.add(x)
    everything.finish()

    def sampled(seed: int) -> LayerStatistics:
        statistics = LayerStatistics(layer, "dropped", max_tokens=500, seed=seed)
        for chunk in x.split([3000, 1000]):  # the longer call must weigh three times as much
            statistics.add(chunk)
        statistics.finish()
        return statistics

    a, b, c = sampled(0), sampled(0), sampled(1)
    assert a.sampled == 1000
    assert torch.equal(a.zz, b.zz)
    assert not torch.equal(a.zz, c.zz)
    mean = torch.stack([sampled(seed).zz for seed in range(16)]).mean(0)
    assert (mean - everything.zz).norm() < 0.1 * everything.zz.norm()


def test_non_finite_activations_are_noticed() -> None:
    for value in (float("nan"), float("inf")):
        statistics = LayerStatistics(layer_with("dropped"), "dropped", max_tokens=100, seed=0)
        assert statistics.finite()
        x = activations(10)
        statistics.add(x)
        assert statistics.finite()
        x[3, 5] = value
        statistics.add(x)
        assert not statistics.finite()
