"""`SparseLinear` with ``precision="fp8"``: its arithmetic, and that the e4m3 copy of the weight follows the weight."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rtlynx
from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, eligibility, launch, ops, reference
from rtlynx.fp8 import missing_kernels, quantize_weight
from rtlynx.reference import E4M3

summary: Any = importlib.import_module("rtlynx.summary")  # the attribute of the package is the function

K, N, RANK = 128, 72, 16
FP8 = SparsityConfig(precision="fp8")


def make(config: SparsityConfig = FP8, dtype: torch.dtype = torch.float32) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.from_linear(nn.Linear(K, N, dtype=dtype), config)


def compensated(config: SparsityConfig = FP8, dtype: torch.dtype = torch.float32) -> SparseLinear:
    layer = make(config, dtype)
    layer.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, torch.randn(K) / 4, permutation=torch.randperm(K))
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def follows(layer: SparseLinear) -> bool:
    """Whether what was prepared is what the weight of now gives."""
    source = layer.weight if layer.sparse_weight is None else layer.sparse_weight
    quantised, scale = quantize_weight(source.detach(), layer.values_scale)
    assert layer.weight_fp8 is not None and layer.weight_scale is not None
    assert layer.weight_fp8.dtype == E4M3 and layer.weight_scale.dtype == torch.float32
    same = torch.equal(layer.weight_fp8.view(torch.uint8), quantised.view(torch.uint8))
    return same and torch.equal(layer.weight_scale, scale)


# ---- arithmetic -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["none", "input", "dropped"])
@pytest.mark.parametrize("norm_compensation", [True, False])
@pytest.mark.parametrize("selection", ["magnitude", "weight"])
def test_forward_is_the_formula(branch: str, norm_compensation: bool, selection: str) -> None:
    options: Any = {"precision": "fp8", "branch": branch, "norm_compensation": norm_compensation, "selection": selection}
    layer = make(SparsityConfig(**options)) if branch == "none" else compensated(SparsityConfig(**options))
    layer.values_scale = 8.0
    x = tokens(5, 7)
    s = layer._select(x)
    weight = layer.weight_fp8.double() * layer.weight_scale.double()[:, None]  # type: ignore[union-attr]
    want = reference.decompress(s.values, s.metadata).double() @ weight.T
    if norm_compensation:
        want *= s.row_scale.double()[:, None]
    if layer.comp_up is not None:
        want += s.branch.double() @ layer.comp_up.double().T
    for bias in (layer.bias, layer.comp_bias):
        want += 0 if bias is None else bias.double()
    torch.testing.assert_close(layer(x).double(), want.view(5, 7, N), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_close_to_the_layer_of_the_models_precision(dtype: torch.dtype) -> None:
    layer, plain = compensated(dtype=dtype), compensated(SparsityConfig(), dtype)
    x = tokens(64, dtype=dtype)
    got, want = layer(x), plain(x)
    assert got.dtype == dtype and not torch.equal(got, want)
    assert (got.float() - want.float()).norm() / want.float().norm() < 0.06  # two operands with 2⁻⁴ at most, each about 2⁻⁴ / √3
    layer.dense = True
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,), (2, 0, 3)])
def test_leading_dimensions_pass_through(shape: tuple[int, ...]) -> None:
    assert compensated()(tokens(*shape)).shape == (*shape, N)


@torch.no_grad()
def test_a_scale_of_the_values_saves_large_and_small_ones() -> None:
    layer, plain = make(), make(SparsityConfig())
    for size in (1e4, 1e-3):
        x = tokens(64) * size
        want = plain(x) - plain.bias
        errors = []
        for layer.values_scale in (1.0, 2.0**-6 if size > 1 else 2.0**8):
            assert follows(layer)
            errors.append(float((layer(x) - layer.bias - want).norm() / want.norm()))
        assert errors[1] < 0.05 < errors[0]


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, float("inf"), float("nan"), True, "1"])
def test_only_powers_of_two_scale_values(scale: Any) -> None:
    layer = make()
    with pytest.raises(InvalidArgumentError, match="a power of two"):
        layer.values_scale = scale
    assert layer.values_scale == 1.0 and follows(layer)


@pytest.mark.parametrize("requires", ["weight", "bias", "comp_up", "input"])
def test_training_is_refused_in_words(requires: str) -> None:
    layer, x = compensated(), tokens(4)
    layer.requires_grad_(False)
    layer.sparse_weight.requires_grad_(requires == "weight")  # type: ignore[union-attr]
    for name, tensor in (("bias", layer.bias), ("comp_up", layer.comp_up), ("input", x)):
        tensor.requires_grad_(requires == name)  # type: ignore[union-attr]
    with pytest.raises(InvalidArgumentError, match=r'expected no gradient, or precision="model" while training'):
        layer(x).sum().backward()


def test_one_graph_serves_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = compensated()
    layer.values_scale = 4.0
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for i, count in enumerate((5, 64, 131)):
            x = tokens(2, count)
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


# ---- the prepared weight ----------------------------------------------------------------------------------------------------------------


def test_the_weight_stays_what_it_was_and_nothing_is_saved() -> None:
    linear = nn.Linear(K, N)
    before = linear.weight.detach().clone()
    layer = SparseLinear.from_linear(linear, FP8)
    assert layer.weight is linear.weight and torch.equal(layer.weight, before)
    assert list(layer.state_dict()) == ["weight", "bias"] and follows(layer)
    back = layer.to_linear()
    assert not dict(back.named_buffers()) and not {"precision", "_values_scale"} & set(vars(back))


def test_the_models_precision_holds_nothing_more() -> None:
    layer = make(SparsityConfig())
    assert layer.weight_fp8 is None and layer.weight_scale is None and layer.values_dtype is None
    assert not dict(layer.named_buffers())


def zero_some(layer: SparseLinear) -> None:
    with torch.no_grad():
        layer.weight[:, : K // 2] = 0


def load(layer: SparseLinear, assign: bool) -> None:
    layer.load_state_dict({"weight": torch.randn(N, K), "bias": torch.zeros(N)}, assign=assign)


def refreshed(layer: SparseLinear) -> None:
    zero_some(layer)
    rtlynx.refresh(nn.Sequential(layer))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: load(layer, assign=False),
        lambda layer: load(layer, assign=True),
        refreshed,
        lambda layer: layer.set_compensation(sparse_weight=torch.randn(N, K)),
        lambda layer: layer.set_compensation(permutation=torch.arange(K).flip(0)),
        lambda layer: (zero_some(layer), layer.configure(FP8)),
        lambda layer: (zero_some(layer), layer.update_prepared()),
        lambda layer: setattr(layer, "values_scale", 0.5),
    ],
)
def test_it_follows(change: Callable[[SparseLinear], object]) -> None:
    layer = make()
    before = layer(tokens(3))
    held = layer.weight_fp8
    change(layer)
    assert follows(layer)
    assert layer.weight_fp8 is held  # overwritten in place
    if layer.values_scale == 1:
        assert not torch.equal(layer(tokens(3)), before)


def test_a_permuted_copy_follows_through_refresh() -> None:
    layer = compensated()
    refreshed(layer)
    assert follows(layer)


def test_configuring_adds_and_drops_it() -> None:
    layer, plain = compensated(SparsityConfig()), compensated(SparsityConfig())
    layer.configure(FP8)
    assert follows(layer)
    layer.configure(SparsityConfig())
    assert layer.weight_fp8 is None and layer.weight_scale is None
    assert torch.equal(layer(tokens(3)), plain(tokens(3)))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_leaves_it_as_it_is(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = compensated(SparsityConfig(precision="fp8", selection="weight"))
    held = layer.weight_fp8.view(torch.uint8).clone(), layer.weight_scale.clone()  # type: ignore[union-attr]
    cast(layer)
    assert layer.weight.dtype != torch.float32
    assert layer.weight_fp8.dtype == E4M3 and layer.weight_scale.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(layer.weight_fp8.view(torch.uint8), held[0]) and torch.equal(layer.weight_scale, held[1])  # type: ignore[union-attr, arg-type]


def test_meta_device_then_loaded() -> None:
    source = make()
    layer = SparseLinear(K, N, device="meta", config=FP8).to(torch.bfloat16)
    assert layer.weight_fp8 is not None and layer.weight_fp8.is_meta and layer.weight_fp8.dtype == E4M3
    layer = layer.to_empty(device="cpu").float()
    layer.load_state_dict(source.state_dict())
    assert follows(layer) and torch.equal(layer(tokens(3)), source(tokens(3)))


def test_an_assigned_checkpoint_prepares_a_meta_layer() -> None:
    source = make()
    layer = SparseLinear(K, N, device="meta", config=FP8)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert follows(layer) and torch.equal(layer(tokens(3)), source(tokens(3)))


def test_a_state_dict_with_compensation_loads() -> None:
    source, target = compensated(), make()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    assert follows(target) and torch.equal(target(tokens(3)), source(tokens(3)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(copied: Callable[[SparseLinear], SparseLinear]) -> None:
    layer = compensated()
    layer.values_scale = 2.0
    want = layer(tokens(4))
    twin = copied(layer)
    assert torch.equal(twin(tokens(4)), want) and follows(twin)
    with torch.no_grad():
        twin.sparse_weight.zero_()  # type: ignore[union-attr]
    twin.update_prepared()
    assert not torch.equal(twin(tokens(4)), want) and torch.equal(layer(tokens(4)), want)


def test_prepared_in_inference_mode_it_can_be_prepared_again() -> None:
    with torch.inference_mode():
        layer = make()
    layer.update_prepared()
    assert follows(layer)


def test_repr_says_so() -> None:
    layer = make()
    assert "precision=fp8, dense=False" in repr(layer) and "precision=model" in repr(make(SparsityConfig()))
    layer.values_scale = 0.5
    assert "precision=fp8, values_scale=0.5" in repr(layer)


# ---- models -----------------------------------------------------------------------------------------------------------------------------


class FluxTransformer2DModel(nn.Module):
    """Found by its name: q, k and v of a block share their input."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.Module()
        attention.to_q, attention.to_k, attention.to_v = (nn.Linear(K, 64) for _ in range(3))
        block = nn.Module()
        block.attn = attention
        self.single_transformer_blocks = nn.ModuleList([block])


def attention(model: nn.Module) -> Any:
    return model.single_transformer_blocks[0].attn  # type: ignore[index, union-attr]


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_layers_share_their_selection_where_precision_and_scale_agree(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention(copied(rtlynx.apply(FluxTransformer2DModel(), SparsityConfig(rank=0, precision="fp8"))))
    layers = (module.to_q, module.to_k, module.to_v)
    asked: list[Tensor] = []
    select = ops.sparsify
    monkeypatch.setattr(ops, "sparsify", lambda x, *args, **more: (asked.append(x), select(x, *args, **more))[1])

    def selections() -> int:
        asked.clear()
        x = tokens(5)
        for layer in layers:
            layer(x)
        return len(asked)

    assert selections() == 1
    module.to_k.values_scale = 2.0
    assert selections() == 2
    module.to_k.configure(SparsityConfig(rank=0))
    assert selections() == 2
    module.to_k.configure(SparsityConfig(rank=0, precision="fp8"))
    module.to_k.values_scale = 1.0
    assert selections() == 1


def test_applying_with_another_precision_keeps_the_compensation() -> None:
    model = rtlynx.apply(nn.Sequential(nn.Linear(K, N)), SparsityConfig(include=("0",), rank=RANK))
    layer: Any = model[0]
    layer.set_compensation(torch.randn(K, RANK), torch.randn(N, RANK))
    rtlynx.apply(model, SparsityConfig(include=("0",), rank=RANK, precision="fp8"))
    assert layer is model[0] and layer.rank == RANK and follows(layer)
    rtlynx.apply(model, SparsityConfig(include=("0",), rank=RANK))
    assert layer.rank == RANK and layer.weight_fp8 is None


@pytest.mark.parametrize("capability, sparse", [((9, 0), True), ((8, 0), False), ((10, 0), False)])
def test_other_gpus_keep_the_layer_dense_and_say_why(capability: tuple[int, int], sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(eligibility, "missing_kernels", lambda device: missing_kernels(torch.device("cuda:0")))
    model = rtlynx.apply(nn.Sequential(nn.Linear(K, N)), SparsityConfig(include=("0",), precision="fp8"))
    (row,) = rtlynx.summary(model)
    assert row.sparse is sparse
    if not sparse:
        has = f"{capability[0]}.{capability[1]}"
        assert row.reason == f'fp8 needs compute capability 9.0, and cuda:0 has {has}; use precision="model" there'
    assert rtlynx.summary(rtlynx.apply(model, SparsityConfig(include=("0",)))).rows[0].sparse


def test_the_extension_is_asked_by_the_name_of_both_element_types(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def kernel(**problem: Any) -> str:
        asked.append(problem["dtype"])
        return "spmm"

    monkeypatch.setattr(launch, "core", lambda: SimpleNamespace(gemm_kernel=kernel))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for precision in ("model", "fp8"):
        layer = make(SparsityConfig(precision=precision), torch.bfloat16)  # type: ignore[arg-type]
        stand_in = SimpleNamespace(
            weight=SimpleNamespace(device=torch.device("cuda")),
            compute_dtype=layer.compute_dtype,
            values_dtype=layer.values_dtype,
            out_features=N,
            in_features=K,
            rank=0,
        )
        assert summary.planned_kernel(stand_in, 4096) == "spmm"
    assert asked == ["bfloat16", "bfloat16_e4m3"]
