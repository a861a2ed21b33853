"""The one-kernel op on the CPU: it is the two ops together, in value, in gradient and in what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, ops, reference
from rtlynx.fused import fused_linear


def layer(dtype: torch.dtype = torch.float32, n: int = 24, k: int = 128, rank: int = 16) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {
        "weight": torch.randn(n, k) / k**0.5,
        "comp_down": torch.randn(k, rank) / k**0.5,
        "comp_up": torch.randn(n, rank),
        "bias": torch.randn(n),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def two_ops(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None = None,
    shift: Tensor | None = None,
    comp_down: Tensor | None = None,
    comp_up: Tensor | None = None,
    bias: Tensor | None = None,
    branch_input: reference.BranchInput = "dropped",
    norm_compensation: bool = True,
) -> Tensor:
    s = ops.sparsify(x, score, shift, comp_down, branch_input, norm_compensation)
    scale, branch = s.row_scale if norm_compensation else None, None if comp_down is None else s.branch
    return ops.sparse_linear(s.values, s.metadata, weight, scale, branch, comp_up, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("norm_compensation", [True, False])
def test_is_the_two_ops(dtype: torch.dtype, branch_input: reference.BranchInput, norm_compensation: bool) -> None:
    x = torch.randn(33, 128).to(dtype)
    args = layer(dtype) | {"score": torch.rand(128), "shift": torch.randn(128)}
    options: dict[str, Any] = {"branch_input": branch_input, "norm_compensation": norm_compensation}
    assert torch.equal(fused_linear(x, **args, **options), two_ops(x, **args, **options))
    weight = args["weight"]
    assert torch.equal(fused_linear(x, weight, **options), two_ops(x, weight, **options))


def test_opcheck() -> None:
    op = torch.ops.rtlynx.fused_linear.default
    for dtype in (torch.float32, torch.bfloat16):
        args = layer(dtype)
        x = torch.randn(70, 128, dtype=dtype, requires_grad=True)
        branch = (args["comp_down"], args["comp_up"].requires_grad_(), args["bias"])
        torch.library.opcheck(op, (x, args["weight"], None, None, *branch, "dropped", True, 1e-8))
        torch.library.opcheck(op, (x, args["weight"], torch.rand(128), torch.rand(128), None, None, None, "input", False, 1e-8))


@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("x", "comp_up")])
def test_gradients_are_those_of_the_two_ops(branch_input: reference.BranchInput, frozen: tuple[str, ...]) -> None:
    inputs: dict[str, Any] = {"x": torch.randn(33, 128), "shift": torch.randn(128), **layer()}
    cotangent = torch.randn(33, 24)
    results = []
    for function in (fused_linear, two_ops):
        leaves: dict[str, Any] = {name: tensor.clone().requires_grad_(name not in frozen) for name, tensor in inputs.items()}
        function(**leaves, branch_input=branch_input).backward(cotangent)
        results.append([leaf.grad for name, leaf in leaves.items() if name not in frozen])
    for got, want in zip(*results, strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want)


def test_compiles_whole_with_a_dynamic_number_of_tokens() -> None:
    torch._dynamo.reset()
    args = layer()
    compiled = torch.compile(fused_linear, backend="aot_eager", fullgraph=True)
    for i, m in enumerate((8, 40, 3, 129)):
        x = torch.randn(m, 128)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, **args), fused_linear(x, **args))


def test_no_tokens() -> None:
    assert fused_linear(torch.empty(0, 128), **layer()).shape == (0, 24)


GOOD: dict[str, Any] = {"x": torch.randn(8, 128), **layer()}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": torch.randn(8, 2, 64)}),
    ("x", {"x": torch.randn(8, 100)}),
    ("x", {"x": torch.empty(8, 0)}),
    ("x", {"x": torch.ones(8, 128, dtype=torch.float64)}),
    ("weight", {"weight": torch.randn(24, 64)}),
    ("weight", {"weight": torch.randn(20, 128)}),
    ("weight", {"weight": torch.randn(24, 128).bfloat16()}),
    ("score", {"score": torch.ones(127)}),
    ("shift", {"shift": torch.ones(128).half()}),
    ("comp_up", {"comp_up": None}),
    ("comp_down", {"comp_down": None}),
    ("comp_down", {"comp_down": torch.ones(64, 16)}),
    ("comp_down", {"comp_down": torch.ones(128, 8), "comp_up": torch.ones(24, 8)}),
    ("comp_up", {"comp_up": torch.ones(24, 32)}),
    ("bias", {"bias": torch.randn(25)}),
    ("branch_input", {"branch_input": "both"}),
    ("eps", {"eps": -1.0}),
    ("eps", {"eps": float("nan")}),
    ("eps", {"eps": float("inf")}),
    ("weight", {"weight": torch.randn(128, 24).T}),
    ("score", {"score": torch.ones(256)[::2]}),
    ("shift", {"shift": torch.ones(1).expand(128)}),
    ("comp_down", {"comp_down": torch.ones(16, 128).T}),
    ("comp_up", {"comp_up": torch.ones(16, 24).T}),
    ("bias", {"bias": torch.randn(1).expand(24)}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_bad_arguments_are_refused(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        fused_linear(**{**GOOD, **change})
    assert (caught.value.op, caught.value.argument) == ("fused_linear", argument)
