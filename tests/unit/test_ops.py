"""The custom ops on the CPU: registration, tracing, gradients, and what bad input gets."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, ops, reference


def layer(n: int = 24, k: int = 128, rank: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, k) / k**0.5, torch.randn(k, rank) / k**0.5, torch.randn(n, rank), torch.randn(n)


def forward(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor, branch_input: reference.BranchInput = "dropped") -> Tensor:
    s = ops.sparsify(x, comp_down=down, branch_input=branch_input)
    return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, up, bias)


def test_opcheck() -> None:
    weight, down, up, bias = layer()
    for x in (torch.randn(9, 128, requires_grad=True), torch.randn(70, 128).bfloat16()):
        d = down.to(x.dtype)
        torch.library.opcheck(torch.ops.rtlynx.sparsify.default, (x, None, None, d, "dropped", True, 1e-8))
        s = ops.sparsify(x.detach(), comp_down=d)
        args = (s.values, s.metadata, weight.to(x.dtype), s.row_scale, s.branch, up.to(x.dtype), bias.to(x.dtype))
        torch.library.opcheck(torch.ops.rtlynx.sparse_linear.default, args)


@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("norm_compensation", [True, False])
def test_gradients_are_those_of_the_straight_mask(branch_input: reference.BranchInput, norm_compensation: bool) -> None:
    """Against autograd through the same formula in plain torch, with mask and row scale as constants."""
    weight, down, up, bias = layer()
    x, shift = torch.randn(33, 128), torch.randn(128)
    s = ops.sparsify(x, None, shift, down, branch_input, norm_compensation)
    mask = reference.decompress(torch.ones_like(s.values), s.metadata)
    scale = s.row_scale[:, None] if norm_compensation else torch.ones(33, 1)

    def through_ops(x: Tensor, shift: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        s = ops.sparsify(x, None, shift, down, branch_input, norm_compensation)
        return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale if norm_compensation else None, s.branch, up, bias)

    def plain(x: Tensor, shift: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        z = x - shift
        kept = scale * mask * z
        return kept @ weight.T + (z if branch_input == "input" else z - mask * z) @ down @ up.T + bias

    cotangent = torch.randn(33, 24)
    results = []
    for function in (through_ops, plain):
        leaves = [t.clone().requires_grad_() for t in (x, shift, weight, down, up, bias)]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiles_whole_with_a_dynamic_number_of_tokens() -> None:
    torch._dynamo.reset()
    args = layer()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for i, m in enumerate((8, 40, 3, 129)):
        x = torch.randn(m, 128)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, *args), forward(x, *args))


def test_no_tokens() -> None:
    weight, down, up, bias = layer()
    assert forward(torch.empty(0, 128), weight, down, up, bias).shape == (0, 24)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("branch_input", ["dropped", "input"])
def test_a_non_finite_token_spoils_its_row_and_no_other(branch_input: reference.BranchInput, bad: float, dtype: torch.dtype) -> None:
    weight, down, up, bias = (t.to(dtype) for t in layer())
    x = torch.randn(70, 128).to(dtype)
    want = forward(x, weight, down, up, bias, branch_input)
    x[17, 3] = bad
    got = forward(x, weight, down, up, bias, branch_input)
    others = torch.arange(70) != 17
    assert got[17].isnan().all()
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_gives_the_bias(dtype: torch.dtype) -> None:
    weight, down, up, bias = (t.to(dtype) for t in layer())
    x = torch.randn(70, 128).to(dtype)
    x[17], x[18] = 0, -0.0
    assert ops.sparsify(x).row_scale[17:19].tolist() == [0, 0]
    assert torch.equal(forward(x, weight, down, up, bias)[17:19], bias.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_channels_the_lower_ones_are_multiplied(dtype: torch.dtype) -> None:
    """With the identity as weight the output is S(X)."""
    x = torch.tensor([[1, -1, 1, 1], [0, 2, -2, 2], [0, -0.0, 0, 3], [3, 1, -1, 1]]).to(dtype).repeat(1, 16)
    s = ops.sparsify(x)
    got = ops.sparse_linear(s.values, s.metadata, torch.eye(64, dtype=dtype))
    want = torch.tensor([[1, -1, 0, 0], [0, 2, -2, 0], [0, 0, 0, 3], [3, 1, 0, 0]]).to(dtype).repeat(1, 16)
    assert torch.equal(got, want)


def test_strided_input_is_read_as_it_is() -> None:
    x = torch.randn(128, 20).T
    got, want = ops.sparsify(x), ops.sparsify(x.contiguous())
    assert torch.equal(got.values, want.values) and torch.equal(got.metadata, want.metadata)
    torch.testing.assert_close(got.row_scale, want.row_scale)  # summed in another order


X = torch.randn(8, 128)
BAD_SPARSIFY: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": torch.randn(8, 2, 64)}),
    ("x", {"x": torch.randn(8, 100)}),
    ("x", {"x": torch.empty(8, 0)}),
    ("x", {"x": torch.ones(8, 128, dtype=torch.float64)}),
    ("x", {"x": torch.ones(8, 128, dtype=torch.int32)}),
    ("score", {"score": torch.ones(127)}),
    ("score", {"score": torch.ones(128).half()}),
    ("shift", {"shift": torch.ones(128, device="meta")}),
    ("comp_down", {"comp_down": torch.ones(64, 16)}),
    ("comp_down", {"comp_down": torch.ones(128, 16).half()}),
    ("comp_down", {"comp_down": torch.ones(128, 8)}),
    ("comp_down", {"comp_down": torch.ones(128, 144)}),
    ("comp_down", {"comp_down": torch.ones(16, 128)}),  # transposed
    ("branch_input", {"branch_input": "both"}),
    ("eps", {"eps": -1.0}),
    ("eps", {"eps": float("nan")}),
    ("eps", {"eps": float("inf")}),
    ("score", {"score": torch.ones(256)[::2]}),
    ("shift", {"shift": torch.ones(1).expand(128)}),
    ("comp_down", {"comp_down": torch.ones(16, 128).T}),
    ("norm_stats", {"norm_stats": torch.ones(2, 8).T}),
    ("places", {"places": torch.zeros(256, dtype=torch.uint8)[::2]}),
]


@pytest.mark.parametrize("argument, change", BAD_SPARSIFY)
def test_sparsify_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(**{"x": X, **change})
    assert (caught.value.op, caught.value.argument) == ("sparsify", argument)


S = ops.sparsify(X, comp_down=torch.randn(128, 16))
GOOD = {"values": S.values, "metadata": S.metadata, "weight": torch.randn(24, 128)}
BAD_SPARSE_LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("values", {"values": S.values[0]}),
    ("values", {"values": S.values[:, :30]}),
    ("metadata", {"metadata": S.metadata[:, :, :3]}),
    ("metadata", {"metadata": S.metadata.long()}),
    ("weight", {"weight": torch.randn(24, 64)}),
    ("weight", {"weight": torch.randn(20, 128)}),
    ("weight", {"weight": torch.randn(24, 128).bfloat16()}),
    ("row_scale", {"row_scale": torch.ones(7)}),
    ("branch", {"comp_up": torch.randn(24, 16)}),
    ("comp_up", {"branch": S.branch}),
    ("comp_up", {"branch": S.branch, "comp_up": torch.randn(24, 32)}),
    ("branch", {"branch": S.branch[:, :8], "comp_up": torch.randn(24, 8)}),
    ("bias", {"bias": torch.randn(25)}),
    ("values", {"values": S.values.T.contiguous().T}),
    ("metadata", {"metadata": S.metadata.transpose(2, 3).contiguous().transpose(2, 3)}),
    ("weight", {"weight": torch.randn(128, 24).T}),
    ("row_scale", {"row_scale": torch.ones(16)[::2]}),
    ("branch", {"branch": S.branch.T.contiguous().T, "comp_up": torch.randn(24, 16)}),
    ("comp_up", {"branch": S.branch, "comp_up": torch.randn(16, 24).T}),
    ("bias", {"bias": torch.randn(1).expand(24)}),
    ("residual", {"residual": torch.randn(24, 8).T}),
    ("gate", {"residual": torch.randn(8, 24), "gate": torch.randn(24, 2).T}),
]


@pytest.mark.parametrize("argument, change", BAD_SPARSE_LINEAR)
def test_sparse_linear_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparse_linear(**{**GOOD, **change})
    assert (caught.value.op, caught.value.argument) == ("sparse_linear", argument)


def test_a_refused_eps_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^sparsify: argument `eps`: got -1\.0, expected a finite number, at least 0$"):
        ops.sparsify(X, eps=-1.0)


def test_errors_say_all_four_things_and_can_be_pickled() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(torch.randn(8, 100))
    assert str(caught.value) == "sparsify: argument `x`: got K = 100, expected K a positive multiple of 64"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.got, copied.expected) == (caught.value.got, caught.value.expected)
