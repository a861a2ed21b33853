"""The ops as citizens of torch: streams, CUDA graphs, torch.compile, autograd, a second device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtlynx import fp8, ops, reference
from shapes import OPERANDS

pytestmark = pytest.mark.usefixtures("kernels")

BF16 = torch.bfloat16


def make_layer(n: int = 256, k: int = 512, rank: int = 16, device: str = "cuda") -> dict[str, Tensor]:
    return {
        "weight": torch.randn(n, k, device=device, dtype=BF16) / k**0.5,
        "down": torch.randn(k, rank, device=device, dtype=BF16) / k**0.5,
        "up": torch.randn(n, rank, device=device, dtype=BF16),
        "bias": torch.randn(n, device=device, dtype=BF16),
    }


def in_operands(layer: dict[str, Tensor], values_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The layer with its weight quantised, if that is asked for."""
    if values_dtype is None:
        return layer
    weight, weight_scale = fp8.quantize_weight(layer["weight"])
    return {**layer, "weight": weight, "weight_scale": weight_scale}


def forward(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight_scale: Tensor | None = None) -> Tensor:
    values_dtype, out_dtype = (None, None) if weight_scale is None else (weight.dtype, x.dtype)
    s = ops.sparsify(x, comp_down=down, values_dtype=values_dtype)
    return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, up, bias, weight_scale, out_dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_non_default_stream(values_dtype: torch.dtype | None) -> None:
    layer, x = in_operands(make_layer(), values_dtype), torch.randn(2000, 512, device="cuda", dtype=BF16)
    want = forward(x, **layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that ignored the stream would run before this input is written
        later = x * 1
        got = forward(later, **layer)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_cuda_graph_replays_on_new_input(values_dtype: torch.dtype | None) -> None:
    layer, x = in_operands(make_layer(), values_dtype), torch.randn(300, 512, device="cuda", dtype=BF16)
    forward(x, **layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(x, **layer)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, forward(x, **layer))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_without_graph_breaks_or_recompiles(mode: str, values_dtype: torch.dtype | None) -> None:
    layer = in_operands(make_layer(), values_dtype)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, mode=mode, dynamic=True)
    for m in (300, 77, 1024):
        x = torch.randn(m, 512, device="cuda", dtype=BF16)
        with torch.compiler.set_stance("default" if m == 300 else "fail_on_recompile"):
            assert torch.equal(compiled(x, **layer).clone(), forward(x, **layer))


def test_gradients_match_the_reference() -> None:
    layer, x = make_layer(), torch.randn(300, 512, device="cuda", dtype=BF16)
    inputs = [x, *layer.values()]

    def gradients(device: str) -> list[Tensor]:
        leaves = [t.detach().to(device).requires_grad_() for t in inputs]
        out = forward(*leaves)
        out.backward(torch.ones_like(out))
        return [leaf.grad.double().cpu() for leaf in leaves if leaf.grad is not None]

    got, want = gradients("cuda"), gradients("cpu")
    assert len(got) == len(want) == 5
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < 1e-2  # bf16 products in another order


def test_opcheck() -> None:
    layer, x = make_layer(), torch.randn(65, 512, device="cuda", dtype=BF16, requires_grad=True)
    torch.library.opcheck(torch.ops.rtlynx.sparsify.default, (x, None, None, layer["down"], "dropped", True, 1e-8))
    s = ops.sparsify(x.detach(), comp_down=layer["down"])
    args = (s.values, s.metadata, layer["weight"], s.row_scale, s.branch, layer["up"], layer["bias"])
    torch.library.opcheck(torch.ops.rtlynx.sparse_linear.default, args)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current() -> None:
    layer, x = make_layer(device="cuda:1"), torch.randn(300, 512, device="cuda:1", dtype=BF16)
    with torch.cuda.device(0):
        got = forward(x, **layer)
        assert torch.cuda.current_device() == 0
    s = reference.sparsify(x, comp_down=layer["down"])
    want = reference.sparse_linear(s.values, s.metadata, layer["weight"], s.row_scale, s.branch, layer["up"], layer["bias"])
    assert got.device == x.device
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
