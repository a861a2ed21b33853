"""`SparseLinear`: its arithmetic, and that it stays an nn.Linear in every way that others rely on."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, ops, reference
from rtlynx.reference import Activation, activated
from rtlynx.sharing import InputGroup

K, N, RANK = 128, 72, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(config: SparsityConfig | None = None, dtype: torch.dtype = torch.float32, bias: bool = True) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.from_linear(nn.Linear(K, N, bias, dtype=dtype), config)


def compensated(config: SparsityConfig | None = None, dtype: torch.dtype = torch.float32, shift: bool = True) -> SparseLinear:
    layer = make(config, dtype)
    layer.set_compensation(torch.randn(K, RANK) / 8, torch.randn(N, RANK) / 8, torch.randn(K) / 4 if shift else None)
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("branch", ["none", "input", "dropped"])
@pytest.mark.parametrize("norm_compensation", [True, False])
@pytest.mark.parametrize("selection", ["magnitude", "weight"])
def test_forward_is_the_formula(branch: str, norm_compensation: bool, selection: str) -> None:
    config = SparsityConfig(branch=branch, norm_compensation=norm_compensation, selection=selection)  # type: ignore[arg-type]
    layer = make(config) if branch == "none" else compensated(config)
    x = tokens(5, 7).flatten(0, 1)
    w, z = layer.weight.double(), x.double()
    if layer.shift is not None:
        z = (x - layer.shift).double()
    score = layer.weight.norm(dim=0) if selection == "weight" else None
    kept = torch.where(reference.keep_mask(z.float(), score), z, 0)
    scale = (z.square().sum(1) / kept.square().sum(1)).sqrt() if norm_compensation else torch.ones(len(x), dtype=torch.float64)
    scaled = scale[:, None] * kept
    want = scaled @ w.T + layer.bias.double()
    if layer.shift is not None:
        want += layer.shift.double() @ w.T
    if layer.comp_down is not None and layer.comp_up is not None:
        read = z if branch == "input" else z - kept
        want += read @ layer.comp_down.double() @ layer.comp_up.double().T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 3, 4), (0,), (2, 0, 3)])
def test_leading_dimensions_and_dtype_pass_through(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = compensated(dtype=dtype)
    x = tokens(*shape, dtype=dtype)
    y = layer(x)
    assert y.shape == (*shape, N)
    assert y.dtype == dtype
    torch.testing.assert_close(y.reshape(-1, N), layer(x.reshape(-1, K)), rtol=0, atol=0)


def test_non_contiguous_input() -> None:
    layer = compensated()
    x = tokens(4, 6)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_switch_is_exactly_the_linear(dtype: torch.dtype) -> None:
    layer = compensated(dtype=dtype)
    x = tokens(9, dtype=dtype)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.dense = True
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_full_rank_split_branch_restores_the_dense_layer() -> None:
    # rank 64 = K with C = Wᵀ: S(X)Wᵀ + (X - S(X))Wᵀ = XWᵀ
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    layer = SparseLinear.from_linear(linear, SparsityConfig(norm_compensation=False))
    layer.set_compensation(torch.eye(64), linear.weight)
    x = torch.randn(33, 64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def test_shift_moves_a_constant_part_out_of_the_way() -> None:
    layer = make(SparsityConfig(norm_compensation=False))
    constant = torch.randn(K) * 3
    x = constant.expand(5, K).contiguous()
    layer.set_compensation(shift=constant)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_parameters_and_hooks_are_shared_both_ways() -> None:
    linear = nn.Linear(K, N).eval()
    calls: list[str] = []
    handle = linear.register_forward_hook(lambda *_: calls.append("forward"))
    linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    linear.note = "set from outside"  # type: ignore[assignment]
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and layer.note == "set from outside"
    layer(tokens(2))
    assert calls == ["pre", "forward"]
    handle.remove()  # a handle from before still works
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight and back.bias is linear.bias
    assert not {"dense", "branch", "selection", "norm_compensation"} & set(back.__dict__)
    back(tokens(2))
    assert calls == ["pre", "forward", "pre"]


def test_a_wrapped_forward_cannot_move() -> None:
    linear = nn.Linear(K, N)
    linear.forward = linear.forward  # type: ignore[method-assign]  # what offloading hooks do
    with pytest.raises(InvalidArgumentError, match="hook"):
        SparseLinear.from_linear(linear)


def test_is_a_linear_with_its_state_dict() -> None:
    linear, layer = nn.Linear(K, N), make()
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    assert not any("lora" in name for name, _ in compensated().named_parameters())


@pytest.mark.parametrize("start", ["fresh", "other rank"])
@pytest.mark.parametrize("shift", [True, False])
def test_state_dict_with_compensation_loads_into_a_layer_without(start: str, shift: bool) -> None:
    config = SparsityConfig(selection="weight")
    source, target = compensated(config, shift=shift), make(config)
    nn.init.normal_(target.weight)
    if start == "other rank":
        target.set_compensation(torch.zeros(K, 32), torch.zeros(N, 32))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file), strict=True)
    x = tokens(6)
    assert torch.equal(target(x), source(x))
    assert target.score is not None and torch.equal(target.score, source.weight.norm(dim=0))


def test_state_dict_of_another_layer_is_refused() -> None:
    other = SparseLinear.from_linear(nn.Linear(K, N + 8))
    other.set_compensation(torch.zeros(K, RANK), torch.zeros(N + 8, RANK))
    with pytest.raises(RuntimeError, match="comp_up"):
        make().load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="comp_down"):  # a layer without a branch has no place for one
        make(SparsityConfig(branch="none")).load_state_dict(compensated(shift=False).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(how: str) -> None:
    layer = compensated(SparsityConfig(selection="weight"))
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = tokens(4)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_casting_keeps_selection_in_float32() -> None:
    layer = compensated(SparsityConfig(selection="weight"))
    score, shift = layer.score, layer.shift
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.comp_down.dtype == layer.comp_up.dtype == layer.comp_bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert score is not None and shift is not None and layer.score is not None and layer.shift is not None
    assert torch.equal(layer.score, score) and torch.equal(layer.shift, shift)
    assert layer(tokens(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device_then_loaded() -> None:
    config = SparsityConfig(selection="weight")
    source = make(config)
    layer = SparseLinear(K, N, device="meta", config=config).to(torch.bfloat16)
    assert layer.score is not None and layer.score.is_meta
    layer = layer.to_empty(device="cpu").float()
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(tokens(3)), source(tokens(3)))


def test_score_follows_the_weight_when_asked() -> None:
    layer = make(SparsityConfig(selection="weight"))
    with torch.no_grad():
        layer.weight[:, 0] = 100
    layer.update_score()
    assert layer.score is not None
    torch.testing.assert_close(layer.score, layer.weight.norm(dim=0))
    assert "score" not in layer.state_dict()


def test_gradients_reach_input_weight_bias_and_branch() -> None:
    layer = compensated()
    for parameter in layer.parameters():
        parameter.requires_grad_()
    x = tokens(4).requires_grad_()
    layer(x).square().sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_compensation_does_not_ask_for_gradients_by_itself() -> None:
    assert not any(p.requires_grad for name, p in compensated().named_parameters() if name.startswith("comp"))


@pytest.mark.parametrize(
    ("down", "up", "expected"),
    [
        ((K, 8), (N, 8), "multiple of 16"),
        ((K, 144), (N, 144), "up to 128"),
        ((K, 16), (N, 32), "shapes"),
        ((N, 16), (N, 16), "shapes"),
        ((16, K), (N, 16), "shapes"),  # comp_down transposed
        ((K, 16), None, "both or neither"),
    ],
)
def test_wrong_factors_are_refused_and_change_nothing(down: tuple[int, int], up: tuple[int, int] | None, expected: str) -> None:
    layer = compensated()
    before = layer(tokens(3))
    with pytest.raises(InvalidArgumentError, match=expected):
        layer.set_compensation(torch.zeros(down), None if up is None else torch.zeros(up))
    with pytest.raises(InvalidArgumentError, match="shift"):
        layer.set_compensation(shift=torch.zeros(K + 1))
    assert torch.equal(layer(tokens(3)), before)


def test_clearing_the_compensation() -> None:
    layer = compensated()
    layer.set_compensation()
    assert layer.rank == 0
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(tokens(3)), make()(tokens(3)))


def test_repr_says_what_matters() -> None:
    text = repr(compensated())
    for piece in (
        f"in_features={K}",
        "rank=16",
        "branch=dropped",
        "norm_compensation=True",
        "selection=magnitude",
        "shift=True",
        "dense=False",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("x", "got", "expected"),
    [
        (tokens(3, dtype=torch.bfloat16), "dtype torch.bfloat16", "dtype torch.float32, as the layer's weight"),
        (torch.randn(3, K // 2), f"shape (3, {K // 2})", f"shape (..., {K})"),
        (torch.randn(()), "shape ()", f"shape (..., {K})"),
        (torch.empty(3, K, device="meta"), "device meta", "device cpu, as the layer's weight"),
    ],
)
@pytest.mark.parametrize("entry", ["forward", "forward_gated", "forward_activated"])
def test_an_input_that_does_not_fit_is_refused_before_selection(
    entry: str, x: Tensor, got: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = compensated()
    monkeypatch.setattr(ops, "sparsify", None)  # were it called, that would be another error
    arguments = {
        "forward": (),
        "forward_gated": (torch.zeros(*x.shape[:-1], N, dtype=x.dtype, device=x.device),),
        "forward_activated": ("gelu_tanh",),
    }
    with pytest.raises(InvalidArgumentError) as refused:
        getattr(layer, entry)(x, *arguments[entry])
    assert refused.value.op.startswith("SparseLinear") and refused.value.argument in ("input", "x")
    assert (refused.value.got, refused.value.expected) == (got, expected)


# ---- what comes before the layer --------------------------------------------------------------------------------------------------------


def before(
    width: int, head: int, activation: Activation, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, gate and head of two samples of 9 tokens, x and gate halves of one tensor."""
    torch.manual_seed(1)
    x, gate = torch.randn(2, 9, 2 * width).to(dtype).chunk(2, -1)
    return x, gate if activation == "silu_gate" else None, torch.randn(2, 9, head).to(dtype) if head else None


ALL_KINDS: list[dict[str, Any]] = [
    {},
    {"branch": "input", "norm_compensation": False},
    {"selection": "weight"},
    {"precision": "fp8"},
    {"small_m": "sparse"},
]


@pytest.mark.parametrize("options", ALL_KINDS, ids=str)
@pytest.mark.parametrize("head", [0, 64])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activated_is_forward_of_the_activation(activation: Activation, head: int, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if options.get("precision") else torch.float32
    layer = compensated(SparsityConfig(**options), dtype)
    x, gate, first = before(layer.in_features - head, head, activation, dtype)
    assert layer.in_selection(18, x.device)
    with torch.no_grad():
        got, want = layer.forward_activated(x, activation, gate, first), layer(activated(x, activation, gate, first))
    assert got.shape == (2, 9, layer.out_features) and torch.equal(got, want)


def switched(layer: SparseLinear, how: str) -> None:
    if how == "permutation":
        layer.set_compensation(permutation=torch.randperm(layer.in_features))
    elif how == "sharing":
        group = InputGroup()
        twin = copy.deepcopy(layer)
        for each in (layer, twin):
            group.join(each)
        group.tie()
        assert layer.sharing == 2
    else:
        setattr(layer, how, True)


@pytest.mark.parametrize("how", ["dense", "dense_step", "permutation", "sharing"])
def test_activated_falls_back_to_the_same(how: str) -> None:
    layer = compensated()
    switched(layer, how)
    x, gate, head = before(layer.in_features - 64, 64, "silu_gate")
    assert not layer.in_selection(18, x.device)
    with torch.no_grad():
        want = layer(activated(x, "silu_gate", gate, head))
        assert torch.equal(layer.forward_activated(x, "silu_gate", gate, head), want)


def test_few_tokens_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtlynx.linear.least_tokens", lambda *_: 10)
    layer = compensated()
    assert not layer.in_selection(9, layer.weight.device) and layer.in_selection(10, layer.weight.device)
    x = tokens(9)
    torch.testing.assert_close(layer.forward_activated(x, "gelu"), F.linear(F.gelu(x), layer.weight, layer.bias))


@pytest.mark.parametrize("dense", [False, True])
def test_a_gate_that_does_not_fit_is_refused_dense_or_not(dense: bool) -> None:
    layer = compensated()
    layer.dense = dense
    x = tokens(9)
    bad: list[tuple[Any, ...]] = [("silu_gate",), ("gelu", x), ("relu",), ("silu_gate", x[:8])]
    for activation, *gate in bad:
        with pytest.raises(InvalidArgumentError, match=r"`(gate|activation)`"):
            layer.forward_activated(x, activation, *gate)


def test_gradients_through_the_activation() -> None:
    layer = compensated()
    given = before(layer.in_features - 64, 64, "silu_gate")
    results = []
    for fused in (True, False):
        x, gate, head = leaves = [t.detach().clone().requires_grad_() for t in given if t is not None]
        out = layer.forward_activated(x, "silu_gate", gate, head) if fused else layer(torch.cat([head, F.silu(x) * gate], -1))
        results.append(torch.autograd.grad(out.square().sum(), [*leaves, layer.weight, layer.bias]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# ---- the two biases, added once ---------------------------------------------------------------------------------------------------------


def without_biases(layer: SparseLinear, x: Tensor) -> Tensor:
    bare = copy.deepcopy(layer)
    bare.bias = bare.comp_bias = None
    return bare(x)  # type: ignore[no-any-return]


def changed(how: str, layer: SparseLinear) -> None:
    with torch.no_grad():
        if how == "bias in place":
            layer.bias.add_(1)
        elif how == "comp_bias in place":
            assert layer.comp_bias is not None
            layer.comp_bias.mul_(2)
        elif how == "another bias":
            layer.bias = nn.Parameter(torch.randn(N))
        elif how == "no bias":
            layer.bias = None  # type: ignore[assignment]
        elif how == "loaded":
            layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})
        elif how == "double":
            layer.to(torch.float64).to(torch.float32)


@pytest.mark.parametrize("how", ["as it is", "bias in place", "comp_bias in place", "another bias", "no bias", "loaded", "double"])
@torch.no_grad()
def test_biases_are_added_as_they_are_now(how: str) -> None:
    layer, x = compensated(), tokens(9)
    layer(x)
    changed(how, layer)
    assert layer.comp_bias is not None
    biases = layer.comp_bias if layer.bias is None else layer.bias + layer.comp_bias
    torch.testing.assert_close(layer(x), without_biases(layer, x) + biases)
    layer.update_prepared()
    assert (layer.output_bias is None) == (layer.bias is None)
    torch.testing.assert_close(layer(x), without_biases(layer, x) + biases)


@torch.no_grad()
def test_both_biases_are_one_tensor_to_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    sparse_linear = ops.sparse_linear
    monkeypatch.setattr(ops, "sparse_linear", lambda *args: given.append(args[6]) or sparse_linear(*args))
    layer = compensated()
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        each(tokens(9))
        assert given.pop() is each.output_bias is not None
        assert "output_bias" not in each.state_dict()
    layer.set_compensation()
    assert layer.output_bias is None


def test_a_captured_sum_follows() -> None:
    layer = compensated()
    held = layer.output_bias
    with torch.no_grad():
        layer.bias.add_(1)
    layer.update_prepared()
    assert layer.output_bias is held is not None
    torch.testing.assert_close(held, (layer.bias + layer.comp_bias).detach())


def test_gradients_reach_both_biases() -> None:
    layer = compensated()
    assert layer.comp_bias is not None
    layer.comp_bias.requires_grad_()
    layer(tokens(9)).sum().backward()
    for bias in (layer.bias, layer.comp_bias):
        torch.testing.assert_close(bias.grad, torch.full((N,), 9.0))


def test_biases_in_fp8_storage_are_not_added() -> None:
    layer = compensated()
    layer.to(torch.float8_e4m3fn)
    assert layer.output_bias is None
    layer.to(torch.float32)
    assert layer.output_bias is not None
