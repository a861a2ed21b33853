"""`rtlynx.compact` on single layers: what it keeps, what it computes, how it travels, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtlynx
from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig
from rtlynx.fp8 import dequantized_weight, quantize_weight
from rtlynx.reference import E4M3

K, N, RANK = 128, 72, 16
FP8 = SparsityConfig(precision="fp8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    config: SparsityConfig = FP8, dtype: torch.dtype = torch.float32, *, permuted: bool = True, bias: bool = True, seed: int = 0
) -> SparseLinear:
    """With a branch, a shift, and a scale of the values; `permuted`: with a weight of its own, which is only permuted."""
    torch.manual_seed(seed)
    layer = SparseLinear.from_linear(nn.Linear(K, N, bias, dtype=dtype), config)
    layer.set_compensation(
        torch.randn(K, RANK) / 8,
        torch.randn(N, RANK) / 8,
        torch.randn(K) / 4,
        permutation=torch.randperm(K) if permuted else None,
        values_scale=0.5,
    )
    return layer


def compacted(*args: Any, **kwargs: Any) -> SparseLinear:
    layer = make(*args, **kwargs)
    rtlynx.compact(nn.Sequential(layer))
    assert layer.is_compact
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def held_bytes(module: nn.Module) -> int:
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}.values())


# ---- what it keeps and computes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("selection", ["magnitude", "weight"])
@torch.no_grad()
def test_the_sparse_product_is_the_same_bit_for_bit(dtype: torch.dtype, permuted: bool, selection: Any) -> None:
    layer = make(SparsityConfig(precision="fp8", selection=selection), dtype, permuted=permuted)
    x = tokens(5, 7, dtype=dtype)
    want, memory, before = layer(x), layer.weight_fp8.data_ptr(), held_bytes(layer)  # type: ignore[union-attr]
    freed = rtlynx.compact(nn.Sequential(layer))
    assert torch.equal(layer(x), want)
    assert layer.weight.dtype == E4M3 and layer.weight.data_ptr() == memory and not layer.weight.requires_grad
    assert layer.weight_fp8 is None and layer.sparse_weight is None
    assert freed == before - held_bytes(layer) == N * K * dtype.itemsize * (1 + permuted) - 4 * (N + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
@torch.no_grad()
def test_the_dense_product_is_that_of_the_rounded_weight(dtype: torch.dtype, permuted: bool) -> None:
    layer = make(dtype=dtype, permuted=permuted)
    quantized, scale = quantize_weight(layer.weight)  # un-permuted: rounding knows no order
    rounded = (quantized.float() * scale[:, None]).to(dtype)
    assert torch.equal(dequantized_weight(quantized, scale, dtype), rounded)
    rtlynx.compact(nn.Sequential(layer))
    for switch in ("dense", "dense_step"):
        setattr(layer, switch, True)
        for shape in ((), (0,), (5,), (2, 3, 4)):
            x = tokens(*shape, dtype=dtype)
            got, want = layer(x), F.linear(x, rounded, layer.bias)
            assert got.dtype == dtype and got.shape == want.shape
            # a permuted sum runs in another order: eps of T for each of the largest terms
            torch.testing.assert_close(got, want, rtol=0, atol=8 * torch.finfo(dtype).eps * float(x.abs().amax() if x.numel() else 0))
        setattr(layer, switch, False)


def test_few_tokens_run_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtlynx.linear.least_tokens", lambda *_: 10)
    layer, dense = make(permuted=False), make(permuted=False)
    want, x = layer(tokens(11))[:9], tokens(11)[:9]
    assert torch.equal(layer(x), dense._dense(x))
    rtlynx.compact(nn.Sequential(layer))
    torch.testing.assert_close(layer(x), want)
    assert layer.least_tokens(layer.weight.device) == 0


def test_the_scale_of_values_can_still_change() -> None:
    layer, other = compacted(), make()
    for scale in (8.0, 0.25):
        layer.values_scale = other.values_scale = scale
        assert torch.equal(layer(tokens(4)), other(tokens(4)))
    layer.dense = True
    before = layer(tokens(4))
    layer.values_scale = 1.0
    assert torch.equal(layer(tokens(4)), before)


def test_it_is_idempotent() -> None:
    layer = compacted()
    want = layer(tokens(3))
    assert rtlynx.compact(nn.Sequential(layer)) == 0
    assert torch.equal(layer(tokens(3)), want)
    assert "compact=True" in repr(layer) and "compact" not in repr(make())


def test_only_what_is_wholly_in_the_copy_becomes_compact(caplog: pytest.LogCaptureFixture) -> None:
    own, plain = make(permuted=False), SparseLinear(K, N, config=SparsityConfig())
    own.set_compensation(sparse_weight=torch.randn(N, K))
    own.dense = True
    model = nn.Sequential(own, plain, make())
    want = [layer(tokens(3)) for layer in model]
    with caplog.at_level("INFO", "rtlynx"):
        rtlynx.compact(model)
    assert [layer.is_compact for layer in model] == [False, False, True]
    assert all(torch.equal(layer(tokens(3)), before) for layer, before in zip(model, want, strict=True))
    assert "compact: not 0: it computes densely too, and its sparse product has another weight" in caplog.text
    assert 'compact: not 1: precision="model"' in caplog.text and "1 of 3 sparse layers" in caplog.text


@torch.no_grad()
def test_a_fitted_weight_is_one_for_sparse_products() -> None:
    layer, bytes_before = make(permuted=False), 2 * N * K * 4
    layer.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, sparse_weight=torch.randn(N, K))
    want = layer(tokens(3))
    assert rtlynx.compact(nn.Sequential(layer)) == bytes_before - 4 * (N + 1)
    other = SparseLinear(K, N, config=SparsityConfig(precision="fp8"))
    other.load_state_dict(layer.state_dict())
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        each.dense = False
        assert each.is_compact and torch.equal(each(tokens(3)), want)
        for switch in ("dense", "dense_step"):
            setattr(each, switch, True)
            with pytest.raises(InvalidArgumentError, match="fitted for sparse products"):
                each(tokens(3))
            setattr(each, switch, False)
    plain = SparseLinear(K, N, config=SparsityConfig(precision="fp8"))
    plain.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8)
    rtlynx.compact(nn.Sequential(plain))
    other.load_state_dict(plain.state_dict())
    other.dense = plain.dense = True
    assert torch.equal(other(tokens(3)), plain(tokens(3)))


def test_a_shared_parameter_is_counted_once() -> None:
    first, second = make(permuted=False), make(permuted=False)
    second.weight = first.weight
    assert rtlynx.compact(nn.Sequential(first, second)) == N * K * 4 - 2 * 4 * (N + 1)


def test_no_more_than_one_layer_is_ever_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    become, weights = SparseLinear.become_compact, list[bool]()

    def watched(layer: SparseLinear, fitted: bool) -> None:
        before = weakref.ref(layer.weight)
        become(layer, fitted)
        weights.append(before() is None)

    monkeypatch.setattr(SparseLinear, "become_compact", watched)
    rtlynx.compact(nn.Sequential(make(), make(permuted=False)))
    assert weights == [True, True]


def test_training_is_refused_and_inputs_of_dense_layers_have_gradients() -> None:
    layer, x = compacted(), tokens(4).requires_grad_()
    with pytest.raises(InvalidArgumentError, match="no gradient"):
        layer(x).sum().backward()
    layer.dense = True
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dense", [False, True])
def test_one_graph_serves_any_number_of_tokens(dense: bool) -> None:
    torch._dynamo.reset()
    layer = compacted()
    layer.dense = dense
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for i, count in enumerate((5, 64, 131)):
            x = tokens(2, count)
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


# ---- how it travels ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.type(torch.float16)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_cast_leaves_the_weight_alone(cast: Callable[[nn.Module], nn.Module], bias: bool) -> None:
    layer = compacted(SparsityConfig(precision="fp8", selection="weight"), bias=bias)
    weight, memory = layer.weight, layer.weight.data_ptr()
    cast(layer)
    assert layer.weight is weight and weight.dtype == E4M3 and weight.data_ptr() == memory
    assert layer.comp_up is not None and layer.compute_dtype == layer.comp_up.dtype != torch.float32
    assert layer.compact_scale.dtype == layer.weight_scale.dtype == layer.score.dtype == torch.float32  # type: ignore[union-attr]


def test_moved_away_and_loaded_again() -> None:
    source = compacted()
    layer = copy.deepcopy(source).to("meta").to(torch.bfloat16)
    assert layer.weight.is_meta and layer.weight.dtype == E4M3
    layer = layer.to_empty(device="cpu").float()
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(tokens(3)), source(tokens(3)))


def by_torch_save(layer: SparseLinear) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
@torch.no_grad()
def test_copies_compute_the_same_and_share_nothing(copied: Callable[[SparseLinear], SparseLinear]) -> None:
    layer = compacted(SparsityConfig(precision="fp8", selection="weight"))
    want = layer(tokens(4))
    twin = copied(layer)
    assert twin.is_compact and twin.weight.dtype == layer.weight.dtype == E4M3 and isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin(tokens(4)), want)
    twin.weight.zero_()
    assert not torch.equal(twin(tokens(4)), want) and torch.equal(layer(tokens(4)), want)
    twin.dense = layer.dense = True
    assert twin.half()(tokens(4, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("selection", ["magnitude", "weight"])
@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_a_state_dict_loads_into_a_compact_layer_and_makes_others_compact(selection: Any, already: bool, assign: bool) -> None:
    config = SparsityConfig(precision="fp8", selection=selection)
    source, target = compacted(config), make(config, seed=1)
    if already:
        rtlynx.compact(nn.Sequential(target))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert not any(target.load_state_dict(torch.load(file), assign=assign))
    assert target.is_compact and torch.equal(target(tokens(4)), source(tokens(4)))
    target.dense = source.dense = True
    assert torch.equal(target(tokens(4)), source(tokens(4)))


def test_the_scale_of_values_travels() -> None:
    source, target = compacted(), compacted(seed=1)
    source.values_scale = 4.0
    target.load_state_dict(source.state_dict())
    assert target.values_scale == 4.0 and torch.equal(target(tokens(4)), source(tokens(4)))
    with pytest.raises(InvalidArgumentError, match="a power of two"):
        target.load_state_dict({**source.state_dict(), "compact_values_scale": torch.tensor([3.0])})


def test_meta_layers_take_an_assigned_checkpoint() -> None:
    source = compacted()
    layer = SparseLinear(K, N, device="meta", config=FP8)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(tokens(3)), source(tokens(3)))


# ---- what it refuses ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda layer: layer.set_compensation(), "set_compensation: argument `self`"),
        (lambda layer: layer.configure(SparsityConfig()), "configure: argument `config`"),
        (lambda layer: layer.configure(SparsityConfig(precision="fp8", selection="weight")), "configure: argument `config`"),
        (lambda layer: layer.to_linear(), "load the model again"),
        (lambda layer: SparseLinear.from_linear(layer), "a compact layer"),
        (lambda layer: layer.load_state_dict(make(seed=1).state_dict()), "a checkpoint that is not compact"),
        (lambda layer: layer.load_state_dict({"compact_scale": torch.ones(N)}, strict=False), "without the e4m3 weight"),
        (lambda layer: rtlynx.remove(nn.Sequential(layer)), r"remove: argument `pipe_or_module`.*1 compact layers \(first 0\)"),
        (lambda layer: rtlynx.refresh(nn.Sequential(layer)), "refresh: argument `pipe_or_module`"),
    ],
)
@torch.no_grad()
def test_what_needs_the_weight_is_refused_and_nothing_changes(act: Callable[[SparseLinear], object], message: str) -> None:
    layer = compacted()
    want, state = layer(tokens(3)), {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(InvalidArgumentError, match=message):
        act(layer)
    assert torch.equal(layer(tokens(3)), want)
    assert all(torch.equal(value.float(), state[key].float()) for key, value in layer.state_dict().items())


def test_a_compact_checkpoint_is_refused_in_the_models_precision() -> None:
    layer = make(SparsityConfig(), seed=1)
    with pytest.raises(InvalidArgumentError, match='applied with precision="fp8"'):
        layer.load_state_dict(compacted().state_dict())


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(K, N)), "without a layer that multiplies in fp8"),
        (nn.Sequential(SparseLinear(K, N)), 'precision="fp8"'),
        (nn.Sequential(SparseLinear(K, N, device="meta", config=FP8)), "offloaded weights"),
    ],
)
def test_models_that_cannot_be_compact(model: nn.Module, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        rtlynx.compact(model)


@pytest.mark.parametrize(
    "config, message",
    [
        (SparsityConfig(include=("0",)), 'precision="model"'),
        (SparsityConfig(include=("0",), precision="fp8", selection="weight"), 'selection="weight"'),
        (SparsityConfig(include=("0",), precision="fp8", branch="input"), "compensation of the compact layer 0"),
        (SparsityConfig(include=("1",), precision="fp8"), "makes the compact layer 0 dense"),
    ],
)
def test_applying_what_would_need_the_weight_is_refused(config: SparsityConfig, message: str) -> None:
    kept = SparsityConfig(include=("0",), precision="fp8", rank=RANK)
    model = rtlynx.apply(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)), kept)
    layer: Any = model[0]
    layer.set_compensation(torch.randn(K, RANK), torch.randn(N, RANK))
    rtlynx.compact(model)
    want = layer(tokens(3))
    with pytest.raises(InvalidArgumentError, match=message):
        rtlynx.apply(model, config)
    assert rtlynx.apply(model, kept)[0] is layer and layer.is_compact and torch.equal(layer(tokens(3)), want)
    assert not rtlynx.apply(model, SparsityConfig(include=("0",), precision="fp8", rank=RANK, small_m="sparse"))[0].dense
