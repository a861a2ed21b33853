"""`SparseLinear` under ``torch.autocast``: what an ``nn.Linear`` takes and gives there, computed in the layer's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, ops
from rtlynx.epilogue import added
from rtlynx.reference import activated
from rtlynx.sharing import InputGroup

K, N, RANK = 128, 64, 16
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALF = pytest.mark.parametrize("half", [BF16, F16])


def compensated(dtype: torch.dtype = F32, config: SparsityConfig | None = None) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(K, N, dtype=dtype), config)
    layer.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, torch.randn(K) / 4)
    return layer


def tokens(dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(2, 9, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@HALF
@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("given", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_it_takes_and_gives_what_a_linear_does(dtype: torch.dtype, given: torch.dtype, precision: Any, half: torch.dtype) -> None:
    layer, x = compensated(dtype, SparsityConfig(precision=precision)), tokens(given)
    want = layer(x.to(dtype))
    with torch.autocast("cpu", half):
        got, dense = layer(x), layer.to_linear()(x)
    # input and layer of one half precision: the layer's, whatever autocast's is (which may have been remembered before)
    assert got.dtype == (dtype if given == dtype == BF16 else dense.dtype)
    assert torch.equal(got, want.to(got.dtype))


@HALF
def test_behind_a_dense_layer(half: torch.dtype) -> None:
    layer, first = compensated(), nn.Linear(K, K)
    with torch.autocast("cpu", half):
        x = first(tokens())
        assert x.dtype == half and torch.equal(layer(x), layer(x.float()))


@pytest.mark.parametrize("entry", ["forward", "forward_gated", "forward_activated"])
def test_switched_off_inside_it_refuses_as_ever(entry: str) -> None:
    layer, x = compensated(), tokens(BF16)
    arguments = {"forward": (), "forward_gated": (torch.zeros(2, 9, N, dtype=BF16),), "forward_activated": ("gelu_tanh",)}
    with torch.autocast("cpu", BF16):
        getattr(layer, entry)(x, *arguments[entry])
        with torch.autocast("cpu", enabled=False), pytest.raises(InvalidArgumentError, match=r"dtype torch\.bfloat16"):
            getattr(layer, entry)(x, *arguments[entry])


def test_what_autocast_leaves_alone_is_refused() -> None:
    with torch.autocast("cpu", BF16), pytest.raises(InvalidArgumentError, match=r"dtype torch\.float64"):
        compensated()(tokens(torch.float64))
    with torch.autocast("cpu", BF16), pytest.raises(InvalidArgumentError, match="device meta"):
        compensated()(tokens().to("meta"))


def test_blocks_step_aside() -> None:
    layer, x, cpu = compensated(), tokens(BF16), torch.device("cpu")
    residual, gate = torch.randn(2, 9, N).to(BF16), torch.randn(2, N).to(BF16)
    assert layer.in_selection(18, cpu) and layer.takes_norm(18, cpu)
    with torch.autocast("cpu", BF16):
        assert not layer.in_selection(18, cpu) and not layer.takes_norm(18, cpu)
        assert torch.equal(layer.forward_gated(x, residual, gate), added(layer(x), residual, gate))
        got = layer.forward_activated(x, "gelu", residual=residual, residual_gate=gate)
        assert torch.equal(got, added(layer(activated(x, "gelu")), residual, gate))


@torch.no_grad()
def test_layers_that_read_one_tensor_still_select_from_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, group, x = [compensated(), compensated()], InputGroup(), tokens(BF16)
    for layer in layers:
        group.join(layer)
    group.tie()
    selected: list[torch.dtype] = []
    sparsify: Callable[..., Any] = ops.sparsify

    def watching(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        selected.append(x.dtype)
        return sparsify(x, *args, **kwargs)

    monkeypatch.setattr(ops, "sparsify", watching)
    with torch.autocast("cpu", BF16):
        first, second = (layer(x) for layer in layers)
    assert selected == [F32] and torch.equal(first, second)


def test_gradients() -> None:
    layer, x = compensated(), tokens(BF16).requires_grad_()
    with torch.autocast("cpu", BF16):
        y = layer(x)
    got = torch.autograd.grad(y.float().square().sum(), [x, layer.weight])
    want = torch.autograd.grad(layer(x.float()).to(BF16).float().square().sum(), [x, layer.weight])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@HALF
@pytest.mark.parametrize("dtype", [F32, BF16])
@torch.no_grad()
def test_compiled_without_a_break(dtype: torch.dtype, half: torch.dtype) -> None:
    torch._dynamo.reset()
    counters.clear()
    layer, x = compensated(dtype), tokens()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x.to(dtype))  # what was traced without it must not serve
    with torch.autocast("cpu", half):
        got, want = compiled(x), layer(x)
    assert got.dtype == want.dtype == half and torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 2


def test_the_ops_multiply_as_without() -> None:
    layer, x = compensated(), tokens().flatten(0, 1)

    def product() -> Tensor:
        s = ops.sparsify(x, comp_down=layer.comp_down)
        return ops.sparse_linear(s.values, s.metadata, layer.weight, s.row_scale, s.branch, layer.comp_up)

    want = product()
    with torch.autocast("cpu", BF16):
        assert torch.equal(product(), want)
