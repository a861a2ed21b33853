"""A layer's permutation: gathered in the selection where it stays in windows, before it where it does not, with the same result."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rtlynx
from permutations import free, in_windows
from rtlynx import SparseLinear, SparsityConfig, reference
from rtlynx.calibrate.selection import Selection, choose
from rtlynx.fp8 import dequantized_weight
from rtlynx.reference import Activation, activated
from rtlynx.sharing import InputGroup

K, N, RANK = 256, 72, 16


def permuted(permutation: Tensor | None, dtype: torch.dtype = torch.float32, **options: Any) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(K, N, dtype=dtype), SparsityConfig(**options))
    layer.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, torch.randn(K) / 4, permutation=permutation)
    return layer


def tokens(m: int, dtype: torch.dtype = torch.float32, k: int = K) -> Tensor:
    return torch.randn(2, m, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def gathered_before(layer: SparseLinear) -> SparseLinear:
    """The same layer, whose selection has to be given the channels in order."""
    other = copy.deepcopy(layer)
    other.places = None
    return other


@pytest.mark.parametrize("options", [{}, {"selection": "weight"}, {"branch": "input"}, {"precision": "fp8"}], ids=str)
@torch.no_grad()
def test_the_result_is_that_of_gathering_before(options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if options.get("precision") else torch.float32
    layer = permuted(in_windows(K), dtype, **options)
    assert layer.places is not None and torch.equal(reference.permutation_of(layer.places), in_windows(K))
    assert layer.selection_inputs()[0] is None
    assert torch.equal(layer(tokens(9, dtype)), gathered_before(layer)(tokens(9, dtype)))


@torch.no_grad()
def test_a_free_permutation_is_gathered_before() -> None:
    layer = permuted(free(K))
    assert layer.places is None and layer.selection_inputs()[0] is layer.permutation
    selected = reference.sparsify(tokens(9).flatten(0, 1)[:, free(K)], None, layer.shift, layer.comp_down)
    want = reference.sparse_linear(*selected[:2], layer.weight[:, free(K)], *selected[2:], layer.comp_up, layer.added_bias())
    assert torch.equal(layer(tokens(9)).flatten(0, 1), want)


@torch.no_grad()
def test_a_calibrated_permutation_stays_in_windows() -> None:
    x, weight = torch.randn(3000, K) * torch.logspace(1, -1, K), torch.randn(N, K)
    for options in (("permutation",), ("shift", "permutation")):
        permutation = choose(options, x, [weight], Selection(), torch.device("cpu")).permutation
        assert permutation is not None and permuted(permutation).places is not None


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu", "silu_gate"])
@pytest.mark.parametrize("head", [0, 64])
@torch.no_grad()
def test_it_takes_in_what_comes_before(activation: Activation, head: int) -> None:
    layer = permuted(in_windows(K))
    x, gate = tokens(9, k=2 * (K - head)).chunk(2, -1)
    what = gate if activation == "silu_gate" else None, tokens(9, k=head) if head else None
    assert layer.in_selection(18, x.device)
    assert not gathered_before(layer).in_selection(18, x.device) and not permuted(free(K)).in_selection(18, x.device)
    got = layer.forward_activated(x, activation, *what)
    assert torch.equal(got, gathered_before(layer)(activated(x, activation, *what)))


def test_gradients_are_those_of_gathering_before() -> None:
    layer = permuted(in_windows(K))

    def gradient(of: SparseLinear) -> Tensor:
        leaf = tokens(9).requires_grad_()
        (grad,) = torch.autograd.grad(of(leaf).square().sum(), leaf)
        return grad

    torch.testing.assert_close(gradient(layer), gradient(gathered_before(layer)))


@pytest.mark.parametrize("before", [None, in_windows(K, 1), free(K, 1)], ids=["none", "windows", "free"])
@pytest.mark.parametrize("after", [in_windows(K), free(K)], ids=["windows", "free"])
@torch.no_grad()
def test_places_follow_a_state_dict_and_are_not_in_it(before: Tensor | None, after: Tensor) -> None:
    saved, layer = permuted(after), permuted(before)
    assert "places" not in saved.state_dict()
    layer.load_state_dict(saved.state_dict())
    assert (layer.places is None) == (saved.places is None)
    assert torch.equal(layer(tokens(9)), saved(tokens(9)))


@torch.no_grad()
def test_places_follow_the_permutation() -> None:
    layer = permuted(in_windows(K))
    layer.set_compensation(permutation=free(K))
    assert layer.places is None
    layer.set_compensation(permutation=in_windows(K, 1))
    assert layer.places is not None and torch.equal(reference.permutation_of(layer.places), in_windows(K, 1))
    layer.set_compensation()
    assert layer.places is None and layer.permutation is None


@torch.no_grad()
def test_places_survive_casts_copies_and_pickles_and_go_along() -> None:
    layer = permuted(in_windows(K), torch.bfloat16)
    x, want = tokens(9, torch.bfloat16), layer(tokens(9, torch.bfloat16))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu", torch.bfloat16)):
        assert other.places is not None and other.places.dtype == torch.uint8
        assert torch.equal(other(x), want)
    assert permuted(in_windows(K)).bfloat16().places.dtype == torch.uint8  # type: ignore[union-attr]
    away = copy.deepcopy(layer).to("meta")
    assert away.places is not None and away.places.is_meta
    away.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(away(x), want)


@torch.no_grad()
def test_a_layer_that_is_nowhere_gets_places_when_it_is_filled() -> None:
    layer, away = permuted(in_windows(K)), permuted(in_windows(K)).to("meta")
    away.update_prepared()
    assert away.places is None
    away.load_state_dict(layer.state_dict(), assign=True)
    assert away.places is not None and torch.equal(away(tokens(9)), layer(tokens(9)))


@torch.no_grad()
def test_a_compact_layer_keeps_its_places_and_gathers_where_it_is_dense() -> None:
    layer = permuted(in_windows(K), torch.bfloat16, precision="fp8")
    x = tokens(9, torch.bfloat16)
    want = layer(x)
    rtlynx.compact(nn.Sequential(layer))
    assert layer.is_compact and layer.places is not None and torch.equal(layer(x), want)
    layer.dense = True
    dense = torch.nn.functional.linear(x[..., in_windows(K)], dequantized_weight(layer.weight, layer.compact_scale, x.dtype), layer.bias)
    assert torch.equal(layer(x), dense)


@torch.no_grad()
def test_layers_that_share_hold_one() -> None:
    group, layers = InputGroup(), [permuted(in_windows(K)) for _ in range(3)]
    for layer in layers:
        group.join(layer)
    group.tie()
    first, second, third = layers
    assert first.places is second.places is third.places and first.sharing == 3
    third.load_state_dict(permuted(in_windows(K, 1)).state_dict())
    assert first.places is second.places is not third.places and (first.sharing, third.sharing) == (2, 1)
    first.to("cpu")
    first.double().float()
    assert first.places is second.places and first.sharing == 2
