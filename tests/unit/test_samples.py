"""The reservoir is bounded, even, seeded; `collect` finds distinct inputs and keeps within its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rtlynx
from rtlynx import InvalidArgumentError, SparsityConfig
from rtlynx.calibrate.collect import Budget, LayerInput, all_dense, collect
from rtlynx.calibrate.samples import Reservoir, capacity_within, seed_of
from rtlynx.eligibility import sparse_layers

CPU = torch.device("cpu")


def numbered(first: int, count: int, channels: int = 2) -> Tensor:
    """Tokens that say which they are."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, channels)


def filled(capacity: int, calls: list[int], seed: int = 0) -> Reservoir:
    reservoir = Reservoir(capacity, 2, torch.float32, CPU, seed)
    first = 0
    for step, count in enumerate(calls):
        reservoir.add(numbered(first, count), step)
        first += count
    return reservoir


def test_everything_is_kept_while_there_is_room() -> None:
    samples = filled(100, [40, 0, 60]).samples()
    assert samples.x[:, 0].sort().values.tolist() == list(range(100))
    assert samples.step.bincount().tolist() == [40, 0, 60]


@pytest.mark.parametrize("calls", [[1000] * 10, [5000, 2000, 3000], [100] * 100, [10_000]])
def test_the_sample_is_bounded_without_repeats_and_every_call_has_its_share(calls: list[int]) -> None:
    reservoir = filled(700, calls)
    samples = reservoir.samples()
    assert reservoir.seen == 10_000
    assert 0.8 * 700 <= len(samples) <= 700
    assert len(samples.x[:, 0].unique()) == len(samples)
    shares = samples.step.bincount(minlength=len(calls)) / len(samples)
    want = torch.tensor(calls) / sum(calls)
    assert ((shares - want).abs() * len(samples) <= 1.5).all()  # at most a token off in a call, and one by rounding


def test_each_token_is_as_likely_as_any_other() -> None:
    counts = torch.zeros(400)
    for seed in range(300):
        counts[filled(100, [100, 300], seed).samples().x[:, 0].long()] += 1
    assert counts[:100].mean() == pytest.approx(float(counts[100:].mean()), rel=0.05)
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.6 * counts.mean()


def test_the_seed_decides() -> None:
    a, b, c = (filled(50, [300, 300], seed).samples() for seed in (0, 0, 1))
    assert torch.equal(a.x, b.x) and torch.equal(a.step, b.step)
    assert not torch.equal(a.x[:40], c.x[:40])
    assert seed_of(0, "a") != seed_of(0, "b") != seed_of(1, "b")


def test_capacity() -> None:
    assert capacity_within(3072, 4, 2, 1 << 30) == 12288
    assert capacity_within(64, 4, 2, 1 << 30) == 8192  # narrow inputs too get enough
    assert capacity_within(15360, 4, 2, 15360 * 2 * 1000) == 1000


class Model(nn.Module):
    """q and k share an input, `after` reads what was written to in place, `again` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.after, self.again, self.never = (nn.Linear(64, 64) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) + self.k(x.view(x.shape))
        x.mul_(2)
        y = y + self.after(x)
        return self.again(self.again(y))


def gather(model: nn.Module, runs: list[Callable[[], object]], memory: int = 1 << 30) -> list[LayerInput]:
    layers = sparse_layers(model)
    with all_dense(layers), tqdm(total=1, disable=True) as bar:
        return list(collect(layers, runs, Budget(4, memory, CPU), seed=0, bar=bar))


def sparse_model() -> Model:
    return rtlynx.apply(Model(), SparsityConfig(include=("**",)))


def test_distinct_inputs_are_found() -> None:
    model = sparse_model()
    found = gather(model, [lambda: model(torch.randn(50, 64))] * 3)
    assert [list(input.layers) for input in found] == [["q", "k"], ["after"], ["again"]]
    assert [input.seen for input in found] == [150, 150, 300]
    assert found[2].samples.step.bincount().tolist() == [150, 150]
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(model).values())


def test_another_pass_sees_the_same_tokens() -> None:
    def runs(model: Model, calls: list[int]) -> list[Callable[[], object]]:
        def one(seed: int) -> object:
            calls.append(seed)
            return model(torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)))

        return [lambda seed=seed: one(seed) for seed in range(3)]  # type: ignore[misc]

    torch.manual_seed(0)
    model, at_once, in_parts = sparse_model(), [], []
    room = 8192 * 64 * 4
    all_inputs = gather(model, runs(model, at_once))
    same = gather(model, runs(model, in_parts), memory=room)
    assert (at_once, in_parts) == ([0, 1, 2], [0, 1, 2] * 3)
    for a, b in zip(all_inputs, same, strict=True):
        assert list(a.layers) == list(b.layers)
        assert torch.equal(a.samples.x, b.samples.x)


def test_less_memory_than_one_input_needs_means_fewer_tokens() -> None:
    model = sparse_model()
    found = gather(model, [lambda: model(torch.randn(5000, 64))], memory=1000 * 64 * 4)
    assert all(800 <= len(input.samples) <= 1000 for input in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_named(value: float) -> None:
    model = sparse_model()
    with torch.no_grad():
        model.after.bias[3] = value
    with pytest.raises(InvalidArgumentError, match="input of again"):
        gather(model, [lambda: model(torch.randn(5, 64))])
