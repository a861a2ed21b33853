"""What compiled code calls instead of the public ops: memory that inductor plans, written by a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, ops, reference

M, N, K, R = 33, 128, 256, 16
E4M3 = torch.float8_e4m3fn


def layers(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    config = SparsityConfig(small_m="sparse", **options)
    made = [SparseLinear(k, n, dtype=torch.bfloat16, config=config) for n, k in ((N, K), (K, N), (64, K))]
    for layer in made:
        n, k = layer.weight.shape
        if layer.branch != "none":
            layer.set_compensation(torch.randn(k, R) / 16, torch.randn(n, R) / 4)
    return nn.Sequential(*made)


def compiled(call: Any, *inputs: Any, dynamic: bool = False) -> tuple[Any, str]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        result, (code,) = run_and_get_code(torch.compile(call, fullgraph=True, dynamic=dynamic), *inputs)
    return result, code


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [({}, False), ({}, True), ({"branch": "none"}, False), ({"norm_compensation": False}, False), ({"precision": "fp8"}, True)],
)
@torch.no_grad()
def test_compiled_layers_write_into_memory_of_inductor(options: dict[str, Any], dynamic: bool) -> None:
    model, x = layers(**options), torch.randn(M, K).bfloat16()
    model[0].shift = torch.randn(K)
    got, code = compiled(model, x, dynamic=dynamic)
    assert (code.count("rtlynx.sparsify_into.default("), code.count("rtlynx.sparse_linear_into.default(")) == (3, 3)
    assert "rtlynx.sparsify.default(" not in code and "rtlynx.sparse_linear.default(" not in code
    assert "cpp_fused" not in code  # what is written into is not filled first
    assert torch.equal(got, model(x))


@torch.no_grad()
def test_memory_is_used_again() -> None:
    _, code = compiled(layers(), torch.randn(M, K).bfloat16())
    assert code.count("# reuse") >= 3


@torch.no_grad()
def test_all_outputs_may_be_wanted() -> None:
    x, down = torch.randn(M, K).bfloat16(), torch.randn(K, R).bfloat16()

    def select(x: Tensor) -> tuple[Tensor, ...]:
        return (*ops.sparsify(x, comp_down=down, values_dtype=E4M3, values_scale=0.5), *ops.sparsify(x, norm_compensation=False))

    got, code = compiled(select, x)
    assert code.count("rtlynx.sparsify_into.default(") == 2
    for a, b in zip(got, select(x), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_gradients_through_compiled_layers() -> None:
    model, x = layers(), torch.randn(M, K).bfloat16()

    def gradient(call: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        call(leaf).float().square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    torch._dynamo.reset()
    torch.testing.assert_close(gradient(torch.compile(model, fullgraph=True)), gradient(model))


@torch.no_grad()
def test_what_is_not_contiguous_goes_to_the_op_that_checks() -> None:
    sparse = reference.sparsify(torch.randn(M, K).bfloat16())
    weight = torch.randn(K, N).bfloat16().T

    def multiply(values: Tensor, metadata: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return ops.sparse_linear(values, metadata, weight, scale)

    got, code = compiled(multiply, sparse.values, sparse.metadata, weight, sparse.row_scale)
    assert "rtlynx.sparse_linear.default(" in code and "rtlynx.sparse_linear_into.default(" not in code
    assert torch.equal(got, multiply(sparse.values, sparse.metadata, weight, sparse.row_scale))


def test_bad_input_is_refused_by_the_trace() -> None:
    torch._dynamo.reset()
    with pytest.raises((InvalidArgumentError, torch._dynamo.exc.TorchRuntimeError), match="comp_down"):
        torch.compile(ops.sparsify, fullgraph=True)(torch.randn(M, K).bfloat16(), comp_down=torch.randn(K, 8).bfloat16())
