"""When a call may take the short way, and what it then passes on; that the result is the same, tests/gpu shows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rtlynx import SparseLinear, SparsityConfig, _core, launch, layer_call
from rtlynx.layer_call import LayerCall
from rtlynx.sharing import InputGroup

K, N, RANK = 128, 64, 16


class Recorder:
    """Sizes and checks as the extension has them; what would be launched is written down."""

    def __init__(self, *made_with: object) -> None:
        self.made_with, self.calls = made_with, []
        self.workspace_bytes = _core.Layer(*made_with).workspace_bytes

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The extension, for tensors on the CPU."""
    monkeypatch.setattr(layer_call, "direct", lambda *tensors: not torch.is_grad_enabled() and Subclass not in map(type, tensors))
    monkeypatch.setattr(launch, "stream", lambda _: 7)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    return SimpleNamespace(Layer=Recorder)


def layer_of(**config: object) -> SparseLinear:
    layer = SparseLinear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16), SparsityConfig(small_m="sparse", **config))  # type: ignore[arg-type]
    layer.set_compensation(torch.randn(K, RANK), torch.randn(N, RANK), torch.randn(K))
    return layer


def inputs() -> Tensor:
    return torch.randn(2, 5, K, dtype=torch.bfloat16)


@torch.no_grad()
def test_both_kernels_get_one_piece_of_memory(core: SimpleNamespace) -> None:
    layer, x = layer_of(precision="fp8"), inputs()
    call = LayerCall(layer, x, core)
    output = call(layer, x)
    assert output is not None and output.shape == (2, 5, N) and output.dtype is torch.bfloat16
    ((name, stream, m, address, _, out),) = call._core.calls
    assert (name, stream, m, address, out) == ("run", 7, 10, x.data_ptr(), output.data_ptr())
    index, dtype, n, k, rank, score, shift, places, down, weight, scale, up, bias, *rest = call._core.made_with
    assert (index, dtype, n, k, rank, score, places) == (-1, "bfloat16_e4m3", N, K, RANK, 0, 0)
    held = (layer.shift, layer.comp_down, layer.weight_fp8, layer.weight_scale, layer.comp_up, layer.output_bias)
    assert (shift, down, weight, scale, up, bias) == tuple(tensor.data_ptr() for tensor in held)
    assert rest == [True, True, 1e-8, 1.0]


@pytest.mark.parametrize("m", [1, 64, 70])
@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("norm_compensation", [True, False])
def test_the_memory_holds_what_selection_returns(core: SimpleNamespace, m: int, precision: str, norm_compensation: bool) -> None:
    layer = layer_of(precision=precision, norm_compensation=norm_compensation)
    x = torch.randn(m, K, dtype=torch.bfloat16)
    parts = layer._select(x)
    expected = sum(-(-tensor.nbytes // 512) * 512 for tensor in parts)  # each begins where an allocation of its own could
    assert LayerCall(layer, x, core)._core.workspace_bytes(m) == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [
        inputs().half(),
        inputs()[..., ::2].repeat(1, 1, 2).transpose(0, 1),
        inputs()[..., : K // 2],
        inputs()[:0],
        torch.randn(10 * K + 4, dtype=torch.float32).bfloat16()[4:].view(10, K),
    ],
    ids=["dtype", "strided", "narrow", "empty", "misaligned"],
)
def test_another_kind_of_input_takes_the_long_way(core: SimpleNamespace, x: Tensor) -> None:
    layer = layer_of()
    call = LayerCall(layer, inputs(), core)
    assert call(layer, x) is None and not call._core.calls


class Subclass(Tensor):
    """One that would see the call."""


def replaced(layer: SparseLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.clone())


def moved(layer: SparseLinear) -> None:
    layer.weight.data = layer.weight.data.clone()


def transposed(layer: SparseLinear) -> None:
    layer.comp_up.data = layer.comp_up.data.view(RANK, N).T


def smaller_branch(layer: SparseLinear) -> None:
    down, up = layer.comp_down, layer.comp_up
    layer.comp_down.data, layer.comp_up.data = down.data[: K // 2], up.data[: N // 2]


def stored_in_fp8(layer: SparseLinear) -> None:
    layer.bias.data = layer.bias.data.view(torch.uint8)[:N].view(torch.float8_e4m3fn)


def bias_written(layer: SparseLinear) -> None:
    layer.comp_bias.add_(1)


def wrapped(layer: SparseLinear) -> None:
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Subclass)


CHANGES: dict[str, Callable[[SparseLinear], object]] = {
    **{change.__name__: change for change in (replaced, moved, transposed, smaller_branch, stored_in_fp8, bias_written, wrapped)},
    "dense": lambda layer: setattr(layer, "dense", True),
    "dense step": lambda layer: setattr(layer, "dense_step", True),
    "no norm compensation": lambda layer: setattr(layer, "norm_compensation", False),
    "scale": lambda layer: setattr(layer, "values_scale", 0.5),
    "no branch": lambda layer: layer.set_compensation(),
    "own weight": lambda layer: layer.set_compensation(sparse_weight=layer.weight),
    "score": lambda layer: layer.configure(SparsityConfig(selection="weight", small_m="sparse")),
    "permutation": lambda layer: layer.set_compensation(permutation=torch.arange(K).flip(0)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_takes_the_long_way(core: SimpleNamespace, change: str) -> None:
    layer, x = layer_of(), inputs()
    call = LayerCall(layer, x, core)
    assert call(layer, x) is not None
    CHANGES[change](layer)
    assert call(layer, x) is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["moved", "replaced", "transposed", "smaller_branch", "stored_in_fp8", "wrapped", "scale", "score"])
def test_a_layer_that_only_moved_is_read_where_it_is_now(core: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(LayerCall, "after", lambda layer, input: LayerCall(layer, input, core))
    layer, x = layer_of(), inputs()
    call = LayerCall(layer, x, core)
    CHANGES[change](layer)
    output = call(layer, x)
    assert (output is not None) == (change in ("moved", "replaced"))
    if output is not None:
        assert layer.weight.data_ptr() in call._core.made_with and [name for name, *_ in call._core.calls] == ["run"]


def test_calls_with_gradients_take_the_long_way(core: SimpleNamespace) -> None:
    layer, x = layer_of(), inputs()
    call = LayerCall(layer, x, core)
    assert call(layer, x) is None


@torch.no_grad()
def test_fewer_tokens_than_pay_take_the_long_way(core: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    monkeypatch.setattr(layer, "least_tokens", lambda _: 10)
    layer.small_m = "dense"
    call = LayerCall(layer, inputs(), core)
    assert call(layer, inputs()) is not None and call(layer, inputs()[:, :4]) is None


@torch.no_grad()
def test_what_is_fused_goes_with_both_kernels(core: SimpleNamespace) -> None:
    layer, gate, x = layer_of(), *torch.randn(2, 5, K, dtype=torch.bfloat16).chunk(2, dim=-1)
    head, residual, residual_gate = (torch.randn(2, *shape, dtype=torch.bfloat16) for shape in ((5, K // 2), (5, N), (N,)))
    call = LayerCall(layer, x, core)
    output = call.fused(layer, x, "silu_gate", gate, head, residual, residual_gate)
    assert output is not None and output.shape == (2, 5, N)
    ((name, *arguments),) = call._core.calls
    (workspace,) = arguments[10:11]
    before = [x.data_ptr(), K, "silu_gate", gate.data_ptr(), K, head.data_ptr(), K // 2, K // 2]  # rows of a chunk are apart
    after = [residual.data_ptr(), residual_gate.data_ptr(), 2, output.data_ptr()]
    assert (name, arguments) == ("run_fused", [7, 10, *before, workspace, *after])


@torch.no_grad()
def test_without_anything_fused_there_are_no_addresses(core: SimpleNamespace) -> None:
    layer, x = layer_of(), inputs()
    call = LayerCall(layer, x, core)
    output = call.fused(layer, x, "none", None, None, None, None)
    assert output is not None
    ((_, _, _, *before, _, residual, gate, gates, out),) = call._core.calls
    assert before == [x.data_ptr(), K, "none", 0, 0, 0, 0, 0] and (residual, gate, gates, out) == (0, 0, 0, output.data_ptr())


HALF = K // 2
FUSED: dict[str, Tensor | None] = {
    "x": torch.randn(2, 5, HALF, dtype=torch.bfloat16),
    "gate": torch.randn(2, 5, HALF, dtype=torch.bfloat16),
    "head": torch.randn(2, 5, HALF, dtype=torch.bfloat16),
    "residual": torch.randn(2, 5, N, dtype=torch.bfloat16),
    "residual_gate": torch.randn(2, N, dtype=torch.bfloat16),
}


def fused(call: LayerCall, layer: SparseLinear, **changed: Tensor | None) -> Tensor | None:
    x, *others = {**FUSED, **changed}.values()
    assert x is not None
    return call.fused(layer, x, "silu_gate", *others)


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.half(),
        lambda tensor: tensor[:1],
        lambda tensor: tensor[..., :-8],
        lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()[:1]])[1:].view(tensor.shape),
        lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        lambda tensor: tensor.as_subclass(Subclass),
    ],
    ids=["dtype", "samples", "channels", "misaligned", "strided channels", "strided samples", "subclass"],
)
def test_what_is_fused_and_does_not_fit_takes_the_long_way(core: SimpleNamespace, name: str, change: Callable[[Tensor], Tensor]) -> None:
    layer, given = layer_of(), FUSED[name]
    call = LayerCall(layer, inputs(), core)
    assert given is not None and fused(call, layer) is not None
    changed = change(given)
    call._core.calls.clear()
    served = fused(call, layer, **{name: changed}) is not None
    fits = torch.equal(changed, given) and changed.is_contiguous() and changed.data_ptr() % 16 == 0 and changed.dtype is torch.bfloat16
    assert served == (fits and type(changed) is Tensor) == bool(call._core.calls)


@torch.no_grad()
@pytest.mark.parametrize("missing", ["head", "residual"])
def test_what_is_fused_and_not_whole_takes_the_long_way(core: SimpleNamespace, missing: str) -> None:
    layer = layer_of()
    call = LayerCall(layer, inputs(), core)
    assert fused(call, layer, **{missing: None}) is None and not call._core.calls


@torch.no_grad()
def test_a_gate_for_rows_that_are_no_samples_takes_the_long_way(core: SimpleNamespace) -> None:
    layer, x, rows = layer_of(), torch.randn(10, K, dtype=torch.bfloat16), torch.randn(2, 10, N, dtype=torch.bfloat16)
    call = LayerCall(layer, x, core)
    assert call.fused(layer, x, "none", None, None, *rows) is None
    assert call.fused(layer, x[0], "none", None, None, *rows[:, 0]) is None
    assert call.fused(layer, x[0, 0], "none", None, None, *rows[:, 0, 0]) is None and not call._core.calls


@torch.no_grad()
def test_what_is_fused_asks_for_the_kernel_and_whether_the_layer_is_alone(core: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    call = LayerCall(layer, inputs(), core)
    assert fused(call, layer) is not None
    with monkeypatch.context() as autocast:
        autocast.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert fused(call, layer) is None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(layer_call, "selection_does", lambda _device, activation: activation == "gelu_tanh")
        assert fused(call, layer) is None
    layer.sharing = 2
    assert fused(call, layer) is None


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_takes_the_long_way_with_what_is_fused(core: SimpleNamespace, change: str) -> None:
    layer = layer_of()
    call = LayerCall(layer, inputs(), core)
    assert fused(call, layer) is not None
    CHANGES[change](layer)
    assert fused(call, layer) is None


@torch.no_grad()
@pytest.mark.parametrize("way", ["forward_gated", "forward_activated"])
def test_a_call_with_something_fused_is_remembered(core: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    layer, x = layer_of(), inputs()
    residual, gate = torch.randn(2, 5, N, dtype=torch.bfloat16), torch.randn(2, N, dtype=torch.bfloat16)
    fusing = (residual, gate) if way == "forward_gated" else ("gelu_tanh", None, None, residual, gate)
    call = LayerCall(layer, x, core)
    monkeypatch.setattr(LayerCall, "after", lambda *_: call)
    getattr(layer, way)(x, *fusing)
    assert layer._call is call and not call._core.calls
    getattr(layer, way)(x, *fusing)
    assert [name for name, *_ in call._core.calls] == ["run_fused"]


@torch.no_grad()
def test_layers_of_a_group_select_once(core: SimpleNamespace) -> None:
    layers, group, x = [layer_of() for _ in range(3)], InputGroup(), inputs()
    for layer in layers:
        layer.set_compensation(layers[0].comp_down, layer.comp_up, layers[0].shift)
        group.join(layer)
    group.tie()
    calls = [LayerCall(layer, x, core) for layer in layers]
    for _ in range(2):
        assert all(call(layer, x) is not None for layer, call in zip(layers, calls, strict=True))
    names = [[name for name, *_ in call._core.calls] for call in calls]
    assert names == [["select", "multiply"] * 2, ["multiply"] * 2, ["multiply"] * 2] and group._kept is None
    workspaces = {call._core.calls[0][3] for call in calls[1:]} | {calls[0]._core.calls[1][3]}
    assert len(workspaces) == 1

    calls[0](layers[0], x)
    x.add_(1)
    calls[1](layers[1], x)
    layers[1].comp_down.add_(1)
    calls[2](layers[2], x)
    assert [name for call in calls for name, *_ in call._core.calls].count("select") == 5


@torch.no_grad()
def test_copies_begin_without(core: SimpleNamespace) -> None:
    layer, x = layer_of(), inputs()
    layer._call = LayerCall(layer, x, core)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), SparseLinear.from_linear(layer)):
        assert twin._call is None
    assert "_call" not in layer.to_linear().__dict__


@torch.no_grad()
def test_the_reference_runs_without() -> None:
    layer, x = layer_of(), inputs()
    layer(x)
    assert layer._call is None
