"""`rtlynx.ops.sparsify` of an activation and of two tensors side by side: what it selects from, gradients, tracing, refusals."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, _core, ops, reference
from rtlynx.activations import selection_does
from rtlynx.reference import E4M3, Activation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
WIDTH, HEAD = 128, 64


def inputs(
    m: int, activation: Activation, head: int = HEAD, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, gate and head, with the rows of one tensor apart as those of a chunk are."""
    torch.manual_seed(m)
    x, gate = torch.randn(m, 2 * WIDTH).to(dtype).chunk(2, 1)
    return x, gate if activation == "silu_gate" else None, torch.randn(m, 3 * HEAD).to(dtype)[:, HEAD : HEAD + head] if head else None


def plainly(x: Tensor, activation: Activation, gate: Tensor | None, head: Tensor | None) -> Tensor:
    """The same in float64, rounded at the end."""
    wide = x.double()
    if activation == "gelu":
        wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
    elif activation == "gelu_tanh":
        wide = wide * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    elif activation == "silu_gate":
        assert gate is not None
        wide = wide * torch.sigmoid(wide) * gate.double()
    return torch.cat([wide] if head is None else [head.double(), wide], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_selected_from(activation: Activation, head: int, dtype: torch.dtype) -> None:
    given = inputs(37, activation, head, dtype)
    x, gate, before = given
    got = reference.activated(x, activation, gate, before)
    assert got.dtype == dtype and got.shape == (37, head + WIDTH)
    torch.testing.assert_close(got.double(), plainly(x, activation, gate, before), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
    if before is not None:
        assert torch.equal(got[:, :head], before)


def test_nothing_to_do_is_the_tensor_itself() -> None:
    x = torch.randn(3, 64)
    assert reference.activated(x) is x


@pytest.mark.parametrize("values_dtype", [None, E4M3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_rest_is_as_without(activation: Activation, head: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    x, gate, before = inputs(21, activation, head, dtype)
    k = WIDTH + head
    score, shift, down = torch.rand(k), torch.randn(k), torch.randn(k, 16).to(dtype)
    selection = score, shift, down, "dropped", True, 1e-8, values_dtype, 2.0 if values_dtype else 1.0
    got = ops.sparsify(x, *selection, activation, gate, before)
    want = ops.sparsify(reference.activated(x, activation, gate, before), *selection)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: Activation, head: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, gate, before = inputs(9, activation, head, dtype)
        for tensor in (x, gate, before) if dtype is torch.float32 else ():
            if tensor is not None:
                tensor.requires_grad_()
        down = torch.randn(WIDTH + head, 16).to(dtype)
        args = x, None, None, down, "dropped", True, 1e-8, None, 1.0, activation, gate, before
        torch.library.opcheck(torch.ops.rtlynx.sparsify.default, args)


@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("head", [0, HEAD])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_activation_before_the_op(
    activation: Activation, head: int, branch_input: reference.BranchInput
) -> None:
    given = inputs(19, activation, head)
    k = WIDTH + head
    shift, down = torch.randn(k), torch.randn(k, 16)

    def gradients(fused: bool) -> list[Tensor]:
        x, gate, before = (None if t is None else t.detach().clone().requires_grad_() for t in given)
        own = [shift.clone().requires_grad_(), down.clone().requires_grad_()]
        assert x is not None
        if fused:
            out = ops.sparsify(x, None, *own, branch_input, activation=activation, gate=gate, head=before)
        else:
            wide = {"none": x, "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh"), "silu_gate": F.silu(x)}[activation]
            wide = wide if gate is None else wide * gate
            out = ops.sparsify(wide if before is None else torch.cat([before, wide], 1), None, *own, branch_input)
        torch.manual_seed(5)
        loss = (out.values * torch.randn_like(out.values)).sum() + (out.branch * torch.randn_like(out.branch)).sum()
        return list(torch.autograd.grad(loss, [t for t in (x, gate, before, *own) if t is not None]))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in inputs(19, "silu_gate", dtype=dtype) if t is not None]
    out = ops.sparsify(leaves[0], comp_down=torch.randn(WIDTH + HEAD, 16).to(dtype), activation="silu_gate", gate=leaves[1], head=leaves[2])
    grads = torch.autograd.grad(out.values.sum() + out.branch.sum(), leaves)
    assert all(grad.dtype == dtype and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu_gate"])
def test_compiles_whole_with_a_dynamic_number_of_tokens(activation: Activation) -> None:
    torch._dynamo.reset()
    weight, down = torch.randn(24, WIDTH + HEAD), torch.randn(WIDTH + HEAD, 16)

    def forward(x: Tensor, gate: Tensor | None, head: Tensor | None) -> Tensor:
        s = ops.sparsify(x, comp_down=down, activation=activation, gate=gate, head=head)
        return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, weight[:, :16].contiguous())

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for i, m in enumerate((8, 40, 3, 129)):
        given = inputs(m, activation)
        for tensor in given:
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*given), forward(*given))


def test_compiles_with_gradients() -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, gate: Tensor, head: Tensor) -> Tensor:
        return ops.sparsify(x, activation="silu_gate", gate=gate, head=head).values.square().sum()

    leaves = [t.requires_grad_() for t in inputs(11, "silu_gate") if t is not None]
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_inductor_selects_once_for_equal_calls_only() -> None:
    torch._dynamo.reset()

    def values(x: Tensor, gate: Tensor, head: Tensor) -> list[Tensor]:
        kinds: list[dict[str, Any]] = [
            {"activation": "silu_gate", "gate": gate, "head": head},
            {"activation": "silu_gate", "gate": gate, "head": head},
            {"activation": "silu_gate", "gate": x, "head": head},
            {"activation": "silu_gate", "gate": gate},
            {"activation": "gelu", "head": head},
            {"head": head},
        ]
        return [ops.sparsify(x, **kind).values for kind in kinds]

    x, gate, head = inputs(11, "silu_gate")
    assert gate is not None and head is not None
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(values, fullgraph=True), x, gate, head)
    assert code[0].count("rtlynx_into.sparsify_cpu(") == 4
    assert code[0].count("rtlynx.sparsify.default(") == 1  # a head and no activation: no kernel does that
    for a, b in zip(got, values(x, gate, head), strict=True):
        torch.testing.assert_close(a, b)


def test_no_tokens() -> None:
    x, gate, head = inputs(0, "silu_gate")
    got = ops.sparsify(x, activation="silu_gate", gate=gate, head=head)
    assert [tuple(t.shape) for t in got] == [(0, 96), (1, 0, 32, 4), (0,), (0, 0)]


X = torch.randn(8, 128)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("activation", {"activation": "relu"}),
    ("gate", {"activation": "silu_gate"}),
    ("gate", {"gate": X}),
    ("gate", {"activation": "gelu", "gate": X}),
    ("gate", {"activation": "silu_gate", "gate": X[:, :64]}),
    ("gate", {"activation": "silu_gate", "gate": X[:7]}),
    ("gate", {"activation": "silu_gate", "gate": X.half()}),
    ("gate", {"activation": "silu_gate", "gate": X.to("meta")}),
    ("head", {"head": X[:, :32]}),
    ("head", {"head": X[:7]}),
    ("head", {"head": X.bfloat16()}),
    ("head", {"head": X.view(8, 2, 64)}),
    ("x", {"x": X[:, :0], "head": X}),
    ("score", {"head": X, "score": torch.ones(128)}),  # they are of K, the head's channels included
    ("shift", {"head": X, "shift": torch.ones(128)}),
    ("comp_down", {"head": X, "comp_down": torch.ones(128, 16)}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(**{"x": X, **change})
    assert (caught.value.op, caught.value.argument) == ("sparsify", argument)


def test_errors_say_what_goes_with_what() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(X, activation="silu_gate")
    assert str(caught.value) == "sparsify: argument `gate`: got None, expected a tensor, since `activation` is 'silu_gate'"


def test_gate_and_head_count_for_the_way_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    monkeypatch.setattr(ops, "direct", lambda *tensors: asked.extend(tensors))
    x, gate, head = inputs(3, "silu_gate")
    ops.sparsify(x, activation="silu_gate", gate=gate, head=head)
    assert any(t is gate for t in asked) and any(t is head for t in asked)


def test_the_gpu_says_what_its_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def activations(device_index: int) -> list[str]:
        asked.append(device_index)
        return ["none", "gelu_tanh"]

    monkeypatch.setattr(_core, "activations", activations)
    gpu = torch.device("cuda", 1)
    assert selection_does(gpu, "gelu_tanh") and not selection_does(gpu, "silu_gate") and asked == [1, 1]
    assert selection_does(torch.device("cpu"), "silu_gate")


@pytest.mark.skipif(_core.driver_version() is not None, reason="this machine has a driver")
def test_without_a_driver_no_kernel_does_anything() -> None:
    assert not selection_does(torch.device("cuda", 0), "gelu_tanh")
