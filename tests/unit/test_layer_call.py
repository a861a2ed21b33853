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
    monkeypatch.setattr(layer_call, "direct", lambda *_: not torch.is_grad_enabled())
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
