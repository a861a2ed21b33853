"""Layers that read the norm of one tensor: what they select from it, and that they select once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, reference
from rtlynx.row_stats import row_stats
from rtlynx.select_normed import select_normed
from rtlynx.sharing import InputGroup

K, N, RANK = 128, 64, 16


def group(shared: bool = True, count: int = 3) -> list[SparseLinear]:
    """Layers of one group that ask for the same selection, or each for its own."""
    torch.manual_seed(0)
    layers, members = [SparseLinear(K, N, config=SparsityConfig(small_m="sparse")) for _ in range(count)], InputGroup()
    down = torch.randn(K, RANK) / 8
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.set_compensation(down if shared else torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, torch.ones(K) / 4)
        members.join(layer)
    members.tie()
    return layers


def given(samples: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, its statistics, weight and bias."""
    torch.manual_seed(1)
    h = torch.randn(2, 5, K) + 1
    return h, row_stats(h.flatten(0, 1)), 1 + torch.randn(samples, K) / 2, torch.randn(samples, K)


def normed(h: Tensor, *norm: Tensor | None) -> Tensor:
    return reference.normed(h.flatten(0, 1), *norm).view_as(h)  # type: ignore[arg-type]


def project(layers: list[SparseLinear], h: Tensor, *norm: Any) -> list[Tensor]:
    return [layer.multiply(select_normed(layer, h, *norm), h.dtype, h.shape[:-1]) for layer in layers]


@pytest.mark.parametrize("shared, count", [(True, 1), (False, 3)])
@torch.no_grad()
def test_layers_that_agree_select_once(shared: bool, count: int, selections: list[Tensor]) -> None:
    layers, (h, *norm) = group(shared), given()
    outputs = project(layers, h, *norm)
    assert len(selections) == count
    x = normed(h, *norm)
    for layer, got in zip(layers, outputs, strict=True):
        assert got.shape == (2, 5, N) and torch.equal(got, layer(x))


@torch.no_grad()
def test_a_layer_alone_needs_no_group() -> None:
    (layer, *_), (h, *norm) = group(), given()
    layer.input_group = None
    assert torch.equal(*project([layer], h, *norm), layer(normed(h, *norm)))


@torch.no_grad()
def test_weight_and_bias_may_be_absent() -> None:
    (layer, *_), (h, stats, weight, _) = group(), given()
    assert torch.equal(*project([layer], h, stats), layer(normed(h, stats)))
    assert torch.equal(*project([layer], h, stats, weight), layer(normed(h, stats, weight)))


@pytest.mark.parametrize("which", ["stats", "weight", "bias", "no norm"])
@torch.no_grad()
def test_another_norm_is_another_selection(which: str) -> None:
    (first, second, _), (h, *norm) = group(), given()
    project([first], h, *norm)
    if which == "no norm":
        got = second(h)
        second.input_group = None
        assert torch.equal(got, second(h))
    else:
        place = ["stats", "weight", "bias"].index(which)
        norm[place] = norm[place] + 1
        assert torch.equal(*project([second], h, *norm), second(normed(h, *norm)))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@torch.no_grad()
def test_a_write_to_what_is_normed_is_seen(place: int) -> None:
    (first, second, _), tensors = group(), given()
    project([first], *tensors)
    tensors[place].mul_(-2)
    assert torch.equal(*project([second], *tensors), second(normed(*tensors)))


def test_gradients_are_those_of_the_norm_before_the_layer() -> None:
    layers, (h, _, weight, bias) = group(), given()

    def gradients(fused: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (h, weight, bias)]
        if fused:
            outputs = project(layers, leaves[0], row_stats(leaves[0].flatten(0, 1)), *leaves[1:])
        else:
            x = torch.nn.functional.layer_norm(leaves[0], (K,), eps=1e-6) * leaves[1][:, None] + leaves[2][:, None]
            outputs = [layer(x) for layer in layers]
        return torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_compiled_layers_select_once() -> None:
    torch._dynamo.reset()
    layers, (h, _, weight, bias) = group(), given()

    def call(h: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        return project(layers, h, row_stats(h.flatten(0, 1)), 1 + scale, bias)

    with torch._inductor.config.patch(fx_graph_cache=False):
        got, (code,) = run_and_get_code(torch.compile(call, fullgraph=True), h, weight - 1, bias)
    assert code.count("rtlynx_into.sparsify_cpu(") == 1 and "rtlynx.sparsify.default(" not in code
    for a, b in zip(got, call(h, weight - 1, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_permutation_is_refused() -> None:
    (layer, *_), (h, *norm) = group(), given()
    assert layer.takes_norm(10, h.device)
    layer.set_compensation(permutation=torch.randperm(K))
    assert not layer.takes_norm(10, h.device)
    with pytest.raises(InvalidArgumentError) as caught:
        select_normed(layer, h, *norm)
    assert (caught.value.op, caught.value.argument) == ("select_normed", "layer")


def test_a_dense_layer_takes_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cpu = group()[0], torch.device("cpu")
    layer.dense = True
    assert not layer.takes_norm(10, cpu)
    layer.dense = False
    assert layer.takes_norm(10, cpu)
    monkeypatch.setattr("rtlynx.linear.selection_norms", lambda device: False)
    assert not layer.takes_norm(10, cpu)
