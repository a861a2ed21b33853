"""Few tokens go to the dense product, by one comparison that compiled code can hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import rtlynx
from rtlynx import SparseLinear, SparsityConfig, linear
from rtlynx.least_tokens import NEVER, _least_tokens, least_tokens

K, N, LEAST = 128, 64, 24


def make(config: SparsityConfig | None = None) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(K, N), config)
    layer.set_compensation(torch.randn(K, 16) / 8, torch.randn(N, 16) / 8)
    return layer


@pytest.fixture
def threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU is a device on which sparse pays from `LEAST` tokens on."""

    @torch.compiler.assume_constant_result
    def pretended(device: torch.device, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> int:
        assert (device.type, n, k, rank, dtype, values_dtype) == ("cpu", N, K, 16, torch.float32, None)
        return LEAST

    monkeypatch.setattr(linear, "least_tokens", pretended)


def test_the_reference_is_never_too_slow() -> None:
    assert least_tokens(torch.device("cpu"), N, K, 64, torch.bfloat16) == 0
    layer, x = make(), torch.randn(1, K)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("shape", "sparse"), [((LEAST - 1,), False), ((LEAST,), True), ((2, 11), False), ((2, 3, 4), True), ((0,), False), ((), False)]
)
@pytest.mark.usefixtures("threshold")
def test_fewer_tokens_are_exactly_the_linear(shape: tuple[int, ...], sparse: bool) -> None:
    layer, x = make(), torch.randn(*shape, K)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) is not sparse
    always = make(SparsityConfig(small_m="sparse"))
    if x.numel():
        assert not torch.equal(always(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("threshold")
def test_two_graphs_serve_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    counters.clear()
    layer = make()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (40, 5, 64, 11, 131, 23, 24, 2, 500):
            x = torch.randn(2, tokens, K) if tokens % 2 else torch.randn(1, tokens, K)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counters["stats"]["unique_graphs"] <= 4  # few and many tokens, one and several samples


@pytest.mark.usefixtures("threshold")
def test_the_threshold_is_a_constant_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(make(), backend=backend, fullgraph=True)(torch.randn(LEAST - 1, K))
    assert not any("sparsify" in str(node.target) for node in graphs[0].graph.nodes)


def test_on_a_gpu_the_core_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def core(**asked: Any) -> int:
        calls.append(asked)
        return 700

    gpu = {"capability": (9, 0), "sms": 132, "memory_gb_s": 4916}
    monkeypatch.setattr(rtlynx, "_core", SimpleNamespace(least_tokens=core, devices=lambda: [gpu]), raising=False)
    _least_tokens.cache_clear()
    for _ in range(2):
        assert least_tokens(torch.device("cuda:0"), 3072, 12288, 64, torch.bfloat16) == 700
        assert least_tokens(torch.device("cuda:0"), 3072, 12288, 64, torch.bfloat16, torch.float8_e4m3fn) == 700
    sizes = gpu | {"n": 3072, "k": 12288, "rank": 64}
    assert calls == [sizes | {"dtype": "bfloat16"}, sizes | {"dtype": "bfloat16_e4m3"}]
    _least_tokens.cache_clear()


@pytest.mark.usefixtures("threshold")
def test_summary_says_so() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    rtlynx.apply(model, SparsityConfig(include=("0",)))
    model[0].set_compensation(torch.randn(K, 16), torch.randn(N, 16))  # type: ignore[operator]
    (few,), (many,) = rtlynx.summary(model, tokens=LEAST - 1), rtlynx.summary(model, tokens=LEAST)
    assert (few.sparse, few.reason, few.kernel) == (False, f"dense is faster with fewer than {LEAST} tokens", "torch")
    assert (many.sparse, many.least_tokens) == (True, LEAST)
    assert f"from {LEAST} tokens on" in str(rtlynx.summary(model, tokens=LEAST))


def test_a_layer_that_is_never_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "least_tokens", torch.compiler.assume_constant_result(lambda *_: NEVER))
    model = rtlynx.apply(nn.Sequential(nn.Linear(K, N)), SparsityConfig(include=("0",)))
    (row,) = rtlynx.summary(model)
    assert (row.sparse, row.reason) == (False, "dense is faster whatever the number of tokens")
    x = torch.randn(2, 30, K)
    want = F.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model(x), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (30, 5000):
        assert compiled(torch.randn(2, tokens, K)).shape == (2, tokens, N)


def test_a_gpu_without_kernels_is_told_of_by_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> int:
        raise rtlynx.DeviceError("sparse_linear", "device", "no sparse tensor cores", "some")

    monkeypatch.setattr(linear, "least_tokens", refuses)
    (row,) = rtlynx.summary(rtlynx.apply(nn.Sequential(nn.Linear(K, N)), SparsityConfig(include=("0",))))
    assert row.least_tokens == 0


def test_the_core_knows_small_layers_from_large_ones() -> None:
    from rtlynx import _core

    def least(n: int, k: int) -> int:
        return _core.least_tokens(capability=(9, 0), sms=132, memory_gb_s=4916, n=n, k=k, rank=64, dtype="bfloat16")

    assert 0 < least(12288, 3072) < 4096 < least(64, 64) == NEVER
