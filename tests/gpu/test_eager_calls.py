"""The short way of eager calls gives the long way's results bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permutations import in_windows
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.activations import selection_does
from rtlynx.layer_call import LayerCall
from rtlynx.sharing import InputGroup

K, N = 512, 192


def layer_of(dtype: torch.dtype = torch.bfloat16, rank: int = 64, bias: bool = True, **options: Any) -> SparseLinear:
    chosen = {"small_m": "sparse", "precision": "model", **options}
    shift, permutation = chosen.pop("shift", False), chosen.pop("permutation", False)
    layer = SparseLinear.from_linear(nn.Linear(K, N, bias, device="cuda", dtype=dtype), SparsityConfig(**chosen))
    branch = (torch.randn(K, rank), torch.randn(N, rank)) if rank else (None, None)
    layer.set_compensation(*branch, torch.randn(K) if shift else None, permutation=in_windows(K) if permutation else None)
    return layer


def inputs(dtype: torch.dtype = torch.bfloat16, m: int = 150) -> Tensor:
    return torch.randn(2, m // 2, K, device="cuda", dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("values_dtype", [None, torch.float8_e4m3fn], ids=["16-bit", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 0, "bias": False},
        {"shift": True, "branch": "input"},
        {"permutation": True, "rank": 16},
        {"norm_compensation": False, "selection": "weight"},
    ],
    ids=["default", "bare", "shift", "permutation", "weight"],
)
def test_the_same(dtype: torch.dtype, values_dtype: torch.dtype | None, options: dict[str, Any]) -> None:
    layer, x = layer_of(dtype, precision="model" if values_dtype is None else "fp8", **options), inputs(dtype)
    want = layer(x)
    assert layer._call is not None
    got = layer._call(layer, x)
    assert got is not None and torch.equal(got, want)
    for other in (inputs(dtype, 6), x[0], x[0, 0]):
        got = layer._call(layer, other)
        layer._call, call = None, layer._call
        assert got is not None and torch.equal(got, layer(other))
        layer._call = call


@torch.no_grad()
@pytest.mark.parametrize("values_dtype", [None, torch.float8_e4m3fn], ids=["16-bit", "e4m3"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("fused", ["none", "gelu_tanh", "gelu", "silu_gate", "head"])
@pytest.mark.usefixtures("kernels")
def test_the_same_with_what_is_fused(fused: str, residual: bool, values_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(precision="model" if values_dtype is None else "fp8", shift=True)
    both = torch.randn(2, 70, 2 * K, device="cuda", dtype=torch.bfloat16)
    x, gate = both.chunk(2, dim=-1) if fused == "silu_gate" else (inputs(m=140), None)
    head, x = (x[..., :128], x[..., 128:]) if fused == "head" else (None, x)
    after = (torch.randn(2, 70, N, device="cuda", dtype=torch.bfloat16), torch.randn(2, N, device="cuda", dtype=torch.bfloat16))
    activation = "gelu_tanh" if fused == "head" else fused
    arguments = (x, activation, gate, head, *(after if residual else (None, None)))
    want = layer.forward_activated(*arguments)
    served = []
    run = LayerCall.fused
    monkeypatch.setattr(LayerCall, "fused", lambda *all: served.append(run(*all)) or served[-1])
    got = layer.forward_activated(*arguments)
    in_kernel = activation == "none" or selection_does(x.device, activation)
    assert torch.equal(got, want) and [output is not None for output in served] == [in_kernel]
    if fused == "none" and residual:
        assert torch.equal(layer.forward_gated(x, *after), want) and served[-1] is not None


@torch.no_grad()
def test_in_inference_mode_too() -> None:
    layer, x = layer_of(), inputs()
    want = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), want) and torch.equal(layer(x.clone()), want)


@torch.no_grad()
def test_a_group_selects_once_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, group, x = [layer_of() for _ in range(3)], InputGroup(), inputs()
    for layer in layers:
        layer.set_compensation(layers[0].comp_down, layer.comp_up)
        group.join(layer)
    group.tie()
    want = [layer(x) for layer in layers]
    assert all(layer._call is not None for layer in layers)
    kept = []
    for layer, expected in zip(layers, want, strict=True):
        assert torch.equal(layer(x), expected)
        kept.append(group._kept and group._kept.selection)
    assert isinstance(kept[0], Tensor) and kept[1] is kept[0] and kept[2] is None


@torch.no_grad()
def test_a_layer_that_moved_is_read_where_it_is() -> None:
    layer, x = layer_of(), inputs()
    want = layer(x)
    layer.weight.data = layer.weight.data.clone()
    assert torch.equal(layer(x), want)
    layer.cpu()
    layer.cuda()
    assert torch.equal(layer(x), want)
    layer.weight.mul_(2)
    layer.bias.zero_()
    layer.set_compensation()
    first = layer(x)
    assert not torch.equal(first, want) and torch.equal(layer(x), first)
    layer.dense = True
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def test_other_streams_and_graphs() -> None:
    layer, x = layer_of(precision="model"), inputs()
    want = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = layer(x)
    stream.synchronize()
    assert torch.equal(elsewhere, want)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(inputs())
    graph.replay()
    assert torch.equal(captured, layer(x))


def test_gradients_flow_after_it() -> None:
    layer, x = layer_of(), inputs()
    with torch.no_grad():
        layer(x)
    assert layer._call is not None
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0
