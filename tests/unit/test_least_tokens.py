"""Few tokens go to the dense product, by one comparison that compiled code can hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrize

import rtlynx
from rtlynx import SparseLinear, SparsityConfig, linear
from rtlynx.layer_call import DenseCall
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


def densely(layer: SparseLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was asked of `least_tokens`: `LEAST` for the layer as it is made, `NEVER` in bfloat16, and 0 once anything else changed."""
    asked: list[tuple[object, ...]] = []

    def least(device: torch.device, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> int:
        asked.append((device.type, rank, dtype, values_dtype))
        return {("cpu", 16, torch.float32, None): LEAST, ("cpu", 16, torch.bfloat16, None): NEVER}.get(asked[-1], 0)

    monkeypatch.setattr(linear, "least_tokens", least)
    return asked


@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_remembers_that_it_had_too_few_tokens(asked: list[tuple[object, ...]], gradients: bool) -> None:
    layer = make()
    with torch.set_grad_enabled(gradients):
        layer(torch.randn(5, K))
        assert isinstance(layer._call, DenseCall)
        asked.clear()
        for x in (torch.randn(5, K), torch.randn(2, 3, K), torch.randn(K), torch.randn(0, K)):
            assert torch.equal(layer(x), densely(layer, x))
        assert not asked
        many = torch.randn(LEAST, K)
        assert not torch.equal(layer(many), densely(layer, many))
        assert asked


def test_whatever_the_number_of_tokens_it_is_not_asked(asked: list[tuple[object, ...]]) -> None:
    layer = make().to(torch.bfloat16)
    for tokens in (5, 5000):
        x = torch.randn(tokens, K, dtype=torch.bfloat16)
        assert torch.equal(layer(x), densely(layer, x))
    assert set(asked) == {("cpu", 16, torch.bfloat16, None)}
    with pytest.raises(RuntimeError, match="shapes"):  # as of nn.Linear
        layer(torch.randn(5, K + 1, dtype=torch.bfloat16))


def compact(layer: SparseLinear) -> None:
    layer.configure(SparsityConfig(precision="fp8"))
    layer(torch.randn(2, K))
    layer.become_compact(fitted=False)


CHANGES: dict[str, Callable[[SparseLinear], object]] = {
    "another rank": lambda layer: layer.set_compensation(torch.randn(K, 32), torch.randn(N, 32)),
    "no branch": lambda layer: layer.set_compensation(),
    "small_m": lambda layer: setattr(layer, "small_m", "sparse"),
    "precision": lambda layer: setattr(layer, "precision", "fp8"),
    "configure": lambda layer: layer.configure(SparsityConfig(precision="fp8")),
    "float16": lambda layer: layer.to(torch.float16),
    "weight.data": lambda layer: setattr(layer.weight, "data", layer.weight.data.half()),
    "another device": lambda layer: layer.to("meta"),
    "compact": compact,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("asked")
def test_what_it_remembers_follows_what_it_depends_on(change: str) -> None:
    layer = make()
    layer(torch.randn(5, K))
    remembered = layer._call
    assert isinstance(remembered, DenseCall)
    CHANGES[change](layer)
    x = torch.randn(5, K).to(layer.weight.device, layer.compute_dtype)
    assert not layer.is_dense_now(5, x.device)
    assert remembered(layer, x) is None
    if change != "weight.data" and not x.is_meta:  # its other tensors are of the old dtype
        layer.update_prepared()
        assert torch.equal(layer(x), layer.multiply(layer._selected(x), x.dtype, x.shape[:-1]))


@torch.no_grad()
def test_what_it_remembers_is_replaced_when_it_is_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "least_tokens", lambda *about: LEAST)
    layer, x = make(), torch.randn(5, K)
    layer(x)
    before = layer._call
    layer.set_compensation(torch.randn(K, 32) / 8, torch.randn(N, 32) / 8)
    assert not layer.was_dense(x)
    layer(x)
    assert layer._call is not before and layer.was_dense(x)


@torch.no_grad()
@pytest.mark.usefixtures("asked")
def test_a_layer_that_is_told_to_be_dense_remembers_nothing() -> None:
    few, many = torch.randn(5, K), torch.randn(LEAST, K)
    for told in ("dense", "dense_step"):
        layer = make()
        setattr(layer, told, True)
        for x in (few, many):
            assert torch.equal(layer(x), densely(layer, x))
        assert layer._call is None
        setattr(layer, told, False)
        assert torch.equal(layer(few), densely(layer, few)) and not torch.equal(layer(many), densely(layer, many))
        layer(few)
        assert isinstance(layer._call, DenseCall)
        setattr(layer, told, True)
        assert torch.equal(layer(many), densely(layer, many))


@torch.no_grad()
@pytest.mark.usefixtures("asked")
def test_copies_and_plain_layers_remember_nothing() -> None:
    layer, x = make(), torch.randn(5, K)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), SparseLinear.from_linear(layer)):
        assert twin._call is None
    assert "_call" not in layer.to_linear().__dict__


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.usefixtures("asked")
def test_a_weight_that_something_else_holds_is_still_the_weight(name: str) -> None:
    layer, x = make(), torch.randn(5, K)
    layer(x)
    parametrize.register_parametrization(layer, name, Doubled())
    held = {"weight": layer.weight, "bias": layer.bias}
    assert name not in layer._parameters and torch.equal(layer(x), F.linear(x, **held))


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
