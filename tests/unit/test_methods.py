"""The closed forms are optimal, robust, and what `fit_input` hands out computes what they claim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rtlynx import SparseLinear, SparsityConfig
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.factor import Factor, low_rank
from rtlynx.calibrate.fit import FEW_TOKENS_RIDGE, RIDGE, Fit, fit_input
from rtlynx.calibrate.methods import METHODS
from rtlynx.calibrate.moments import Moments, Piece
from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.calibrate.samples import Samples
from rtlynx.calibrate.selection import Selection

K, N = 64, 96
CPU = torch.device("cpu")


def activations(tokens: int, seed: int = 0) -> Tensor:
    """Correlated, heavy-tailed tokens with constant parts; the same distribution for every seed."""
    rng = torch.Generator().manual_seed(99)
    mixing = torch.randn(K, K, generator=rng) * torch.logspace(0, -2, K)[:, None]
    constant = 2 * torch.randn(K, generator=rng) * (torch.rand(K, generator=rng) < 0.3)
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, K, generator=rng).pow(3) @ mixing + 0.05 * torch.randn(tokens, K, generator=rng) + constant


def weight(seed: int = 5) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / 8


def problem(norm_compensation: bool = True, tokens: int = 3000, rank: int = 16, ridge: float = 1e-9, centred: bool = False) -> Problem:
    moments = Moments(activations(tokens), Selection(norm_compensation=norm_compensation), centred, CPU)
    return Problem(moments, weight(), rank, ridge)


def pieces(p: Problem) -> dict[str, Tensor]:
    (all_at_once,) = p.moments.chunks()
    return {name: piece.double() for name, piece in all_at_once.items()}


def error(p: Problem, method: str, solution: Solution) -> float:
    """Mean squared error over the calibration tokens, written down without moments."""
    x, wt = pieces(p), p.wt
    left = x["missed"] @ wt
    if solution.weight_change is not None:
        left = left - x["kept"] @ solution.weight_change
    if solution.branch is not None:
        left = left - x["whole" if METHODS[method].branch == "input" else "dropped"] @ solution.branch.down @ solution.branch.up.T
    return float(left.square().sum() / len(left))


@pytest.mark.parametrize("norm_compensation", [True, False])
@pytest.mark.parametrize("method", ["split", "paper"])
@pytest.mark.parametrize("rank", [16, 48])
def test_no_other_branch_of_this_rank_is_better(method: str, norm_compensation: bool, rank: int) -> None:
    p = problem(norm_compensation, rank=rank)
    solution = METHODS[method].solve(p)
    assert solution.branch is not None and solution.weight_change is None
    down, up = solution.branch
    assert down.shape == (K, rank) and up.shape == (N, rank)
    best = error(p, method, solution)
    x = pieces(p)
    z, target = x["whole" if method == "paper" else "dropped"], x["missed"] @ p.wt

    def alternate(up: Tensor) -> tuple[Tensor, float]:
        """Alternating least squares, another solver of the same problem."""
        down = torch.linalg.lstsq(z, target @ torch.linalg.pinv(up.T)).solution
        up = torch.linalg.lstsq(z @ down, target).solution.T
        return up, float((target - z @ down @ up.T).square().sum() / len(z))

    assert alternate(up)[1] > best * (1 - 1e-4)
    for seed in range(2):
        up, found = torch.randn(up.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 0.0
        for _ in range(60):
            up, found = alternate(up)
        assert best * (1 - 1e-4) < found < best * 1.02


@pytest.mark.parametrize("norm_compensation", [True, False])
def test_refit_is_least_squares_and_joint_is_better_than_either(norm_compensation: bool) -> None:
    p = problem(norm_compensation)
    found = {method: METHODS[method].solve(p) for method in ("plain", "split", "refit", "joint")}
    errors = {method: error(p, method, solution) for method, solution in found.items()}
    x = pieces(p)
    best = torch.linalg.lstsq(x["kept"], x["missed"] @ p.wt).solution
    assert found["refit"].weight_change is not None
    torch.testing.assert_close(found["refit"].weight_change, best, rtol=1e-2, atol=1e-3)
    assert errors["joint"] < 0.9 * min(errors["split"], errors["refit"])
    assert max(errors["split"], errors["refit"]) < 0.8 * errors["plain"]


def test_joint_cannot_be_improved_by_either_of_its_parts() -> None:
    p = problem()
    solution = METHODS["joint"].solve(p)
    assert solution.branch is not None and solution.weight_change is not None
    best, x = error(p, "joint", solution), pieces(p)
    target = x["missed"] @ p.wt
    left = target - x["dropped"] @ solution.branch.down @ solution.branch.up.T
    other = Solution(solution.branch, torch.linalg.lstsq(x["kept"], left).solution)
    assert error(p, "joint", other) > best * (1 - 1e-3)
    rng = torch.Generator().manual_seed(0)
    for part in solution.branch:
        direction = torch.randn(part.shape, generator=rng, dtype=torch.float64)
        step = 0.02 * part.norm() * direction / direction.norm()
        down, up = (factor + step if factor is part else factor for factor in solution.branch)
        left = target - x["dropped"] @ down @ up.T
        refitted = left - x["kept"] @ torch.linalg.lstsq(x["kept"], left).solution
        assert refitted.square().sum() / len(left) > best


def test_training_comes_close_to_the_closed_form_and_not_below() -> None:
    p = problem(ridge=1e-6)
    closed, trained = (error(p, method, METHODS[method].solve(p)) for method in ("paper", "paper-trained"))
    assert closed * (1 - 1e-3) < trained < 1.05 * closed


def test_split_of_full_rank_is_the_weight() -> None:
    p = problem(norm_compensation=False, rank=K)
    branch = METHODS["split"].solve(p).branch
    assert branch is not None
    torch.testing.assert_close(branch.down @ branch.up.T, p.wt, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_factors_are_balanced_whatever_the_scale_of_the_activations(scale: float) -> None:
    moments = Moments(activations(2000) * scale, Selection(), False, CPU)
    branch = METHODS["paper"].solve(Problem(moments, weight(), 16, 1e-2)).branch
    assert branch is not None
    torch.testing.assert_close(branch.down.norm(dim=0), branch.up.norm(dim=0))
    assert branch.down.half().isfinite().all() and branch.up.half().isfinite().all()


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_handful_of_tokens_give_finite_numbers(method: str, tokens: int) -> None:
    solution = METHODS[method].solve(problem(tokens=tokens, ridge=0.1, centred=True))
    for tensor in (*(solution.branch or ()), solution.weight_change):
        assert tensor is None or tensor.isfinite().all()


@pytest.mark.parametrize("method", ["split", "paper", "refit", "joint"])
def test_zeros_give_zeros(method: str) -> None:
    solution = METHODS[method].solve(Problem(Moments(torch.zeros(20, K), Selection(), False, CPU), weight(), 16, 1e-2))
    if solution.branch is not None:
        assert not (solution.branch.down @ solution.branch.up.T).any()
    if solution.weight_change is not None:
        assert not solution.weight_change.any()


# ---- fit_input --------------------------------------------------------------------------------------------------------------------------


def layers(count: int = 1) -> dict[str, SparseLinear]:
    torch.manual_seed(7)
    made = {}
    for i in range(count):
        linear = nn.Linear(K, N)
        nn.init.normal_(linear.weight, std=10.0**-i)
        made[f"layer{i}"] = SparseLinear.from_linear(linear)
    return made


def fitted_error(fit: Fit, held_out: Tensor, count: int = 1) -> dict[str, float]:
    """Relative error of every layer on held-out tokens, through the layer itself."""
    made = layers(count)
    x = activations(6000)
    for name, tensors in fit_input(LayerInput(made, Samples(x, torch.zeros(len(x), dtype=torch.int32)), len(x)), fit, CPU):
        made[name].configure(SparsityConfig(branch=METHODS[fit.method].branch, norm_compensation=fit.norm_compensation))
        made[name].set_compensation(**tensors)
    errors = {}
    with torch.no_grad():
        for name, layer in made.items():
            want = nn.functional.linear(held_out, layer.weight, layer.bias)
            errors[name] = float((layer(held_out) - want).norm() / want.norm())
    return errors


def test_what_the_layer_computes_gets_better_with_everything_that_is_added() -> None:
    held_out = activations(2000, seed=1)
    steps = [
        Fit("plain", 0, bias=True),
        Fit("plain", 0, ("shift",), bias=True),
        Fit("split", 16, ("shift", "permutation"), bias=True),
        Fit("split", 48, ("shift", "permutation"), bias=True),
        Fit("joint", 48, ("shift", "permutation"), bias=True),
    ]
    errors = [fitted_error(fit, held_out)["layer0"] for fit in steps]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.1 * errors[0], errors


def test_split_and_paper_reduce_held_out_error_and_rank_helps_split() -> None:
    held_out = activations(2000, seed=1)
    errors = {(method, rank): fitted_error(Fit(method, rank), held_out)["layer0"] for method in ("split", "paper") for rank in (16, 32, 48)}
    without = fitted_error(Fit("plain", 0), held_out)["layer0"]
    split = [without, *(errors["split", rank] for rank in (16, 32, 48))]
    assert split == sorted(split, reverse=True), errors
    assert split[3] < 0.5 * split[0], errors
    assert errors["paper", 16] < 0.95 * without, errors
    assert errors["split", 32] < errors["paper", 32], errors  # the paper's branch gains little from rank


@pytest.mark.parametrize("method", ["plain", "split", "refit", "joint", "paper"])
@pytest.mark.parametrize("selection", [(), ("shift",), ("permutation",), ("shift", "permutation")])
def test_a_bias_takes_the_mean_error_away(method: str, selection: tuple[str, ...]) -> None:
    made, x = layers(), activations(4000)
    input = LayerInput(made, Samples(x, torch.zeros(len(x), dtype=torch.int32)), len(x))
    ((name, tensors),) = fit_input(input, Fit(method, 16, selection, bias=True), CPU)
    made[name].configure(SparsityConfig(branch=METHODS[method].branch))
    made[name].set_compensation(**tensors)
    layer = made[name]
    with torch.no_grad():
        mean = (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).mean(0)
        typical = nn.functional.linear(x, layer.weight).std(0)
    assert float((mean.abs() / typical).max()) < 2e-3


def test_layers_that_select_together_get_one_comp_down_and_the_weaker_one_is_not_forgotten() -> None:
    from rtlynx.sharing import InputGroup

    made, x = layers(2), activations(4000)
    group = InputGroup()
    for layer in made.values():
        group.join(layer)
    input = LayerInput(made, Samples(x, torch.zeros(len(x), dtype=torch.int32)), len(x))
    together = dict(fit_input(input, Fit("split", 32), CPU))
    assert torch.equal(together["layer0"]["comp_down"], together["layer1"]["comp_down"])
    alone = dict(fit_input(input, Fit("split", 32, share=False), CPU))
    assert not torch.equal(alone["layer0"]["comp_down"], alone["layer1"]["comp_down"])

    def relative(name: str, found: dict[str, dict[str, Tensor]]) -> float:
        layer = made[name]
        layer.set_compensation(**found[name])
        with torch.no_grad():
            want = nn.functional.linear(x, layer.weight, layer.bias)
            return float((layer(x) - want).norm() / want.norm())

    for name in made:  # the second layer's outputs are a tenth of the first's
        none = relative(name, {name: {}})
        assert relative(name, alone) < relative(name, together) < 0.8 * none


@pytest.mark.parametrize(("outputs", "rank", "columns"), [(N, 8, 16), (N, 20, 32), (8, 64, 16), (N, 128, 64)])
def test_a_branch_is_as_wide_as_the_kernels_want_it_and_no_more_than_it_can_use(outputs: int, rank: int, columns: int) -> None:
    torch.manual_seed(0)
    made = {"layer": SparseLinear.from_linear(nn.Linear(K, outputs))}
    x = activations(2000)
    input = LayerInput(made, Samples(x, torch.zeros(len(x), dtype=torch.int32)), len(x))
    ((_, tensors),) = fit_input(input, Fit("split", rank), CPU)
    assert tensors["comp_down"].shape == (K, columns) and tensors["comp_up"].shape == (outputs, columns)
    used = min(rank, K, outputs)
    assert tensors["comp_down"][:, :used].any(0).all() and not tensors["comp_down"][:, used:].any()
    made["layer"].set_compensation(**tensors)


@pytest.mark.parametrize("method", ["split", "paper", "refit", "joint"])
@pytest.mark.parametrize(("tokens", "ridge"), [(40, FEW_TOKENS_RIDGE), (2 * K - 1, FEW_TOKENS_RIDGE), (2 * K, RIDGE), (4000, RIDGE)])
def test_few_tokens_get_the_larger_ridge(tokens: int, ridge: float, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factor, used = Moments.factor, set()

    def watched(self: Moments, piece: Piece, ridge: float) -> Factor:
        used.add(ridge)
        return factor(self, piece, ridge)

    monkeypatch.setattr(Moments, "factor", watched)
    x = activations(tokens)
    input = LayerInput(layers(), Samples(x, torch.zeros(tokens, dtype=torch.int32)), tokens)
    ((_, tensors),) = fit_input(input, Fit(method, 16), CPU)
    assert used == {ridge} and FEW_TOKENS_RIDGE > RIDGE
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ---- linear algebra ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_moments_are_means_of_products(centred: bool) -> None:
    moments = problem(centred=centred).moments
    x = {name: piece - piece.mean(0) if centred else piece for name, piece in pieces(problem()).items()}
    for a, b in (("kept", "kept"), ("dropped", "missed"), ("missed", "dropped"), ("whole", "missed")):
        want = x[a].T @ x[b] / len(x[a])
        torch.testing.assert_close(moments.product(a, b).double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))  # type: ignore[arg-type]


def test_an_indefinite_moment_is_factored_all_the_same() -> None:
    moment = torch.eye(K)
    moment[0, 0] = -0.1
    factor = Factor.of(moment, 1e-3)
    assert factor.lower.isfinite().all() and not factor.zero


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
