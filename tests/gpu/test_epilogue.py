"""What follows the sparse product in its kernel, against the same steps by torch on what the kernel gives without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, fp8, ops
from rtlynx.reference import Activation, finished
from shapes import MODEL_SHAPES, OPERANDS, TAIL_SHAPES

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.bfloat16, torch.float16]
SAMPLES = 3


def product(
    m: int, n: int, k: int, rank: int = 64, dtype: torch.dtype = torch.bfloat16, values_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The arguments of `ops.sparse_linear` without an epilogue."""
    down = torch.randn(k, rank, device="cuda", dtype=dtype) / k**0.5 if rank else None
    up = torch.randn(n, rank, device="cuda", dtype=dtype) if rank else None
    weight, bias = torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5, torch.randn(n, device="cuda", dtype=dtype)
    sparse = ops.sparsify(torch.randn(m, k, device="cuda", dtype=dtype), comp_down=down, values_dtype=values_dtype)
    scale = None
    if values_dtype is not None:
        weight, scale = fp8.quantize_weight(weight)
    named = {"values": sparse.values, "metadata": sparse.metadata, "weight": weight, "row_scale": sparse.row_scale, "comp_up": up}
    more = {"branch": sparse.branch if rank else None, "bias": bias, "weight_scale": scale}
    return named | more | {"out_dtype": None if scale is None else dtype}


def among_poison(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows; what lies before and behind them is NaN."""
    whole = torch.full((rows + 2, columns), torch.nan, device="cuda", dtype=dtype)
    return whole[1:-1].normal_()


def check(activation: Activation, residual: bool, samples: int, m: int, n: int, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    added = among_poison(m, n, dtype) if residual else None
    gate = among_poison(samples, n, dtype) if samples else None
    y = ops.sparse_linear(**arguments)
    got = ops.sparse_linear(**arguments, activation=activation, residual=added, gate=gate)
    want = finished(y, activation, added, gate)
    assert got.shape == want.shape and got.dtype == dtype
    if activation == "none":
        assert torch.equal(got, want)  # a product of two T is exact in float32: one rounding is left
    else:  # the kernel's exponential may move z by its last bit, and the gate takes that along
        factor = 1 if gate is None else max(1.0, gate.abs().max().item())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), want.float(), rtol=2 * eps, atol=factor * eps * y.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("m, n, k", TAIL_SHAPES, ids=str)
def test_tails(m: int, n: int, k: int, activation: Activation, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    m *= SAMPLES
    arguments = product(m, n, k, 64, dtype, values_dtype)
    for residual, samples in ((False, 0), (True, 0), (True, 1), (True, SAMPLES), (True, m)):
        check(activation, residual, samples, m, n, dtype, arguments)


@pytest.mark.parametrize("rank", [0, 16, 64, 128])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_behind_a_branch(rank: int, activation: Activation, values_dtype: torch.dtype | None) -> None:
    arguments = product(300, 328, 320, rank, values_dtype=values_dtype)
    check(activation, True, SAMPLES, 300, 328, torch.bfloat16, arguments)


@pytest.mark.parametrize("m, n", [(66, 64), (300, 72), (2001, 136), (2001, 1160), (5001, 3072), (3, 3072)], ids=str)
@pytest.mark.parametrize("k", [64, 128, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_every_tile(m: int, n: int, k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check("none", True, SAMPLES, m, n, dtype, product(m, n, k, 32, dtype, values_dtype))


@pytest.mark.large
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, n, k", MODEL_SHAPES, ids=str)
def test_model_shapes(m: int, n: int, k: int, values_dtype: torch.dtype | None) -> None:
    arguments = product(m, n, k, 64, values_dtype=values_dtype)
    check("none", True, 1, m, n, torch.bfloat16, arguments)
    check("gelu_tanh", False, 0, m, n, torch.bfloat16, arguments)


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_only_the_output_is_written(values_dtype: torch.dtype | None) -> None:
    """Rows before and behind those of Y stay as they were, and Y is written whole."""
    m, n = 201, 328
    arguments = product(m, n, 320, values_dtype=values_dtype)
    residual, gate = torch.randn(m, n, device="cuda").bfloat16(), torch.randn(SAMPLES, n, device="cuda").bfloat16()
    want = ops.sparse_linear(**arguments, residual=residual, gate=gate)
    around = torch.full((m + 512, n), torch.nan, device="cuda", dtype=torch.bfloat16)
    names = ("values", "metadata", "weight", "row_scale", "branch", "comp_up", "bias", "weight_scale")
    out = around[256 : 256 + m]
    torch.ops.rtlynx.sparse_linear_into(*(arguments[name] for name in names), out, "none", residual, gate)
    assert torch.equal(out, want)
    assert around[:256].isnan().all() and around[256 + m :].isnan().all()


def test_a_non_finite_residual_stays_where_it_is() -> None:
    m, n = 100, 64
    residual = torch.randn(m, n, device="cuda").bfloat16()
    residual[17, 3], residual[50, 63] = torch.nan, torch.inf
    finite = ops.sparse_linear(**product(m, n, 256), residual=residual).isfinite()
    assert torch.equal(finite, residual.isfinite())


def test_cuda_graph_replays_on_a_new_residual_and_gate() -> None:
    m, n = 300, 256
    arguments = product(m, n, 512)
    residual, gate = torch.randn(m, n, device="cuda").bfloat16(), torch.randn(SAMPLES, n, device="cuda").bfloat16()
    ops.sparse_linear(**arguments, residual=residual, gate=gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sparse_linear(**arguments, residual=residual, gate=gate)
    for _ in range(3):
        residual.normal_(), gate.normal_()
        graph.replay()
        assert torch.equal(out, ops.sparse_linear(**arguments, residual=residual, gate=gate))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@torch.no_grad()
def test_a_layer_adds_to_the_residual(values_dtype: torch.dtype | None) -> None:
    config = SparsityConfig(small_m="sparse", precision="model" if values_dtype is None else "fp8")
    layer = SparseLinear(512, 256, device="cuda", dtype=torch.bfloat16, config=config)
    x, residual = torch.randn(2, 130, 512, device="cuda").bfloat16(), torch.randn(2, 130, 256, device="cuda").bfloat16()
    gate = torch.randn(2, 3 * 256, device="cuda").bfloat16().chunk(3, 1)[1]
    got = layer.forward_gated(x, residual, gate)
    assert torch.equal(got, finished(layer(x).flatten(0, 1), "none", residual.flatten(0, 1), gate).view_as(residual))


def test_bad_input_is_refused_before_anything_runs() -> None:
    m, n = 8, 16
    arguments = product(m, n, 128, rank=0)
    residual, gate = torch.zeros(m, n, device="cuda").bfloat16(), torch.zeros(2, n, device="cuda").bfloat16()
    flat = torch.zeros(m * n + 1, device="cuda").bfloat16()
    for argument, bad in {
        "residual": [residual.half(), residual.cpu(), residual[1:], residual.repeat(1, 2)[:, :n], flat[1:].view(m, n)],
        "gate": [gate.half(), gate.repeat(1, 2)[:, :n], gate[:0], torch.zeros(3, n, device="cuda").bfloat16(), flat[1 : n + 1].view(1, n)],
    }.items():
        for value in bad:
            with pytest.raises(InvalidArgumentError) as caught:
                ops.sparse_linear(**{**arguments, "residual": residual, "gate": gate, argument: value})
            assert (caught.value.op, caught.value.argument) == ("sparse_linear", argument)


def test_a_residual_that_is_written_is_refused() -> None:
    m, n = 8, 16
    arguments = product(m, n, 128, rank=0)
    names = ("values", "metadata", "weight", "row_scale", "branch", "comp_up", "bias", "weight_scale")
    out = torch.zeros(m, n, device="cuda").bfloat16()
    with pytest.raises(InvalidArgumentError, match="apart from out"):
        torch.ops.rtlynx.sparse_linear_into(*(arguments[name] for name in names), out, "none", out, None)
    assert not out.any()
