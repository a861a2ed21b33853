"""`rtlynx.ops.sparsify` of gathered channels: which ones, the same as gathering them before, gradients, tracing, refusals."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from permutations import free, in_windows
from rtlynx import InvalidArgumentError, ops, reference
from rtlynx.reference import E4M3, Activation, permutation_of, places_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
K, HEAD = 192, 64


def places(k: int = K, seed: int = 0) -> Tensor:
    found = places_of(in_windows(k, seed))
    assert found is not None
    return found


def inputs(m: int, activation: Activation, head: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(m)
    x, gate = torch.randn(m, 2 * (K - head)).to(dtype).chunk(2, 1)
    return x, gate if activation == "silu_gate" else None, torch.randn(m, head).to(dtype) if head else None


def test_a_place_is_a_piece_and_a_channel_of_it() -> None:
    """K = 128: quarters of 32 channels, two windows, pieces of 16."""
    given = torch.arange(64).repeat(2).byte()
    first = [*range(0, 16), *range(32, 48), *range(64, 80), *range(96, 112)]
    assert permutation_of(given).tolist() == first + [channel + 16 for channel in first]
    given[64 + 5] = 16 * 2 + 3
    assert permutation_of(given)[64 + 5] == 2 * 32 + 16 * 1 + 3


@pytest.mark.parametrize("k", [64, 128, 192, 256, 1152, 2432])
def test_places_are_the_permutation(k: int) -> None:
    permutation = in_windows(k)
    found = places_of(permutation)
    assert found is not None and found.dtype == torch.uint8
    assert torch.equal(permutation_of(found), permutation)
    assert all(window.sort().values.tolist() == list(range(64)) for window in found.view(-1, 64))


def test_what_is_no_permutation_of_windows_has_no_places() -> None:
    assert places_of(free(K)) is None
    assert places_of(torch.arange(K)) is None  # neighbours are of one quarter
    assert places_of(free(64)) is not None
    swapped = in_windows(K)
    swapped[[63, 64]] = swapped[[64, 63]]
    assert places_of(swapped) is None
    twice = in_windows(K)
    twice[1] = twice[0]
    for other in (twice, torch.zeros(64, dtype=torch.int64), in_windows(K) + K, in_windows(K) - K, torch.arange(96)):
        assert places_of(other) is None


@pytest.mark.parametrize("values_dtype", [None, E4M3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_as_if_channels_were_gathered_before(
    activation: Activation, head: int, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    x, gate, before = inputs(21, activation, head, dtype)
    score, shift, down = torch.rand(K), torch.randn(K), torch.randn(K, 16).to(dtype)
    selection = score, shift, down, "dropped", True, 1e-8, values_dtype, 2.0 if values_dtype else 1.0
    got = ops.sparsify(x, *selection, activation, gate, before, places=places())
    want = ops.sparsify(reference.activated(x, activation, gate, before)[:, in_windows(K)], *selection)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_go_back_to_the_channels_they_came_from(activation: Activation, head: int, branch_input: reference.BranchInput) -> None:
    given = inputs(19, activation, head)
    shift, down = torch.randn(K), torch.randn(K, 16)

    def gradients(fused: bool) -> list[Tensor]:
        x, gate, before = (None if t is None else t.detach().clone().requires_grad_() for t in given)
        own = [shift.clone().requires_grad_(), down.clone().requires_grad_()]
        assert x is not None
        if fused:
            out = ops.sparsify(x, None, *own, branch_input, activation=activation, gate=gate, head=before, places=places())
        else:
            whole = reference.activated(x, activation, gate, before)
            out = ops.sparsify(whole.index_select(1, in_windows(K)), None, *own, branch_input)
        torch.manual_seed(5)
        loss = (out.values * torch.randn_like(out.values)).sum() + (out.branch * torch.randn_like(out.branch)).sum()
        return list(torch.autograd.grad(loss, [t for t in (x, gate, before, *own) if t is not None]))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["none", "silu_gate"])
def test_opcheck(activation: Activation) -> None:
    x, gate, before = inputs(9, activation, HEAD)
    selection = None, None, torch.randn(K, 16), "dropped", True, 1e-8, None, 1.0
    args = x.requires_grad_(), *selection, activation, gate, before, None, None, None, places()
    torch.library.opcheck(torch.ops.rtlynx.sparsify.default, args)


@torch.no_grad()
def test_inductor_selects_once_for_equal_calls_only() -> None:
    torch._dynamo.reset()

    def values(x: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        return [ops.sparsify(x, places=each).values for each in (first, first, second, None)]

    given = torch.randn(11, K), places(), places(seed=1)
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(values, fullgraph=True), *given)
    assert code[0].count("rtlynx_into.sparsify_cpu(") == 3
    assert "rtlynx.sparsify.default(" not in code[0] and "index_select" not in code[0]
    for a, b in zip(got, values(*given), strict=True):
        assert torch.equal(a, b)


def test_compiles_with_gradients() -> None:
    torch._dynamo.reset()
    own, leaf = places(), torch.randn(11, K, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return (ops.sparsify(x, places=own).values * torch.arange(K // 2)).sum()

    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf), leaf)
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(got, want)


def test_no_tokens() -> None:
    got = ops.sparsify(torch.empty(0, K), comp_down=torch.randn(K, 16), places=places())
    assert [tuple(t.shape) for t in got] == [(0, K // 2), (1, 0, 32, 4), (0,), (0, 16)]


BAD: list[dict[str, Any]] = [
    {"places": places()[:64]},
    {"places": places().long()},
    {"places": places().to("meta")},
    {"places": places(), "head": torch.randn(8, 64)},  # they are of K, the head's channels included
]


@pytest.mark.parametrize("change", BAD)
def test_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(**{"x": torch.randn(8, K), **change})
    assert (caught.value.op, caught.value.argument) == ("sparsify", "places")


def test_places_count_for_the_way_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    monkeypatch.setattr(ops, "direct", lambda *tensors: asked.extend(tensors))
    own = places()
    ops.sparsify(torch.randn(3, K), places=own)
    assert any(tensor is own for tensor in asked)
