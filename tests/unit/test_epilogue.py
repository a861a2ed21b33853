"""What follows the sparse product, `activation`, `residual` and `gate` of `rtlynx.ops.sparse_linear`: values, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, fp8, linear, ops
from rtlynx.reference import E4M3, Activation, finished

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, S, N, K, R = 3, 7, 24, 128, 16
M = B * S
EPILOGUES: list[tuple[Activation, bool, bool]] = [
    ("none", True, False),
    ("none", True, True),
    ("gelu_tanh", False, False),
    ("gelu_tanh", True, False),
    ("gelu_tanh", True, True),
]
"""Activation, whether there is a residual, whether there is a gate."""


def product(dtype: torch.dtype, values_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments of `ops.sparse_linear` without an epilogue."""
    torch.manual_seed(0)
    weight, down = torch.randn(N, K).to(dtype) / K**0.5, torch.randn(K, R).to(dtype) / K**0.5
    sparse = ops.sparsify(torch.randn(M, K).to(dtype), comp_down=down, values_dtype=values_dtype)
    scale = None
    if values_dtype is not None:
        weight, scale = fp8.quantize_weight(weight)
    named = {"values": sparse.values, "metadata": sparse.metadata, "weight": weight, "row_scale": sparse.row_scale, "branch": sparse.branch}
    more = {"comp_up": torch.randn(N, R).to(dtype), "bias": torch.randn(N).to(dtype), "weight_scale": scale}
    return named | more | {"out_dtype": None if scale is None else dtype}


def epilogue(activation: Activation, with_residual: bool, with_gate: bool, dtype: torch.dtype, gates: int = B) -> dict[str, Any]:
    torch.manual_seed(1)
    residual = torch.randn(M, N).to(dtype) if with_residual else None
    return {"activation": activation, "residual": residual, "gate": torch.randn(gates, N).to(dtype) if with_gate else None}


def step_by_step(y: Tensor, activation: Activation, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """As a block writes it."""
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = (gate.unsqueeze(1) * y.view(gate.shape[0], -1, N)).view(y.shape)
    return y if residual is None else residual + y


@pytest.mark.parametrize("values_dtype", [None, E4M3])
@pytest.mark.parametrize("gates", [1, B, M])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, with_residual, with_gate", EPILOGUES)
def test_what_follows_the_rounded_product(
    activation: Activation, with_residual: bool, with_gate: bool, dtype: torch.dtype, gates: int, values_dtype: torch.dtype | None
) -> None:
    arguments, after = product(dtype, values_dtype), epilogue(activation, with_residual, with_gate, dtype, gates)
    y = ops.sparse_linear(**arguments)
    got = ops.sparse_linear(**arguments, **after)
    z = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
    want = step_by_step(z.double(), "none", *(None if t is None else t.double() for t in (after["residual"], after["gate"])))
    assert got.dtype == dtype and got.shape == (M, N)
    torch.testing.assert_close(got.double(), want, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


def test_nothing_to_do_is_the_tensor_itself() -> None:
    y = torch.randn(3, 8)
    assert finished(y) is y


@pytest.mark.parametrize("activation, with_residual, with_gate", EPILOGUES)
def test_opcheck(activation: Activation, with_residual: bool, with_gate: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = list((product(dtype) | epilogue(activation, with_residual, with_gate, dtype)).values())
        for tensor in tensors if dtype is torch.float32 else ():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_(tensor.dim() == 2)  # all but row scale and bias
        torch.library.opcheck(torch.ops.rtlynx.sparse_linear.default, tuple(tensors))


@pytest.mark.parametrize("activation, with_residual, with_gate", EPILOGUES)
def test_gradients_are_those_of_the_steps(activation: Activation, with_residual: bool, with_gate: bool) -> None:
    arguments, after = product(torch.float32), epilogue(activation, with_residual, with_gate, torch.float32)
    leaves = {name: arguments[name] for name in ("values", "weight", "branch", "comp_up", "bias")}
    leaves |= {name: after[name] for name in ("residual", "gate") if after[name] is not None}

    def gradients(fused: bool) -> tuple[Tensor, ...]:
        mine = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        of_product = arguments | {name: tensor for name, tensor in mine.items() if name in arguments}
        finish = after | {name: tensor for name, tensor in mine.items() if name in after}
        out = ops.sparse_linear(**of_product, **finish) if fused else step_by_step(ops.sparse_linear(**of_product), **finish)
        torch.manual_seed(5)
        return torch.autograd.grad((out * torch.randn_like(out)).sum(), list(mine.values()))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_product_in_fp8_passes_gradients_to_residual_and_gate_alone() -> None:
    arguments, after = product(torch.bfloat16, E4M3), epilogue("none", True, True, torch.bfloat16)
    residual, gate = after["residual"].requires_grad_(), after["gate"].requires_grad_()
    got = torch.autograd.grad(ops.sparse_linear(**arguments, **after).sum(), (residual, gate))
    want = torch.autograd.grad(step_by_step(ops.sparse_linear(**arguments), **after).sum(), (residual, gate))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    arguments["bias"].requires_grad_()
    with pytest.raises(InvalidArgumentError, match="e4m3"):
        ops.sparse_linear(**arguments, **after).sum().backward()


def test_no_tokens() -> None:
    sparse = ops.sparsify(torch.empty(0, K))
    residual, gate = torch.empty(0, N), torch.ones(2, N)
    out = ops.sparse_linear(sparse.values, sparse.metadata, torch.randn(N, K), sparse.row_scale, residual=residual, gate=gate)
    assert out.shape == (0, N)


RESIDUAL, GATE = torch.randn(M, N), torch.randn(B, N)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("activation", {"activation": "gelu"}),
    ("activation", {"activation": "silu_gate", "residual": RESIDUAL, "gate": GATE}),
    ("residual", {"gate": GATE}),
    ("residual", {"residual": RESIDUAL[:-1]}),
    ("residual", {"residual": RESIDUAL[:, :-8]}),
    ("residual", {"residual": RESIDUAL.bfloat16()}),
    ("residual", {"residual": RESIDUAL.view(B, S, N)}),
    ("residual", {"residual": RESIDUAL.to("meta")}),
    ("gate", {"residual": RESIDUAL, "gate": GATE[:2]}),  # 21 rows are no two samples
    ("gate", {"residual": RESIDUAL, "gate": GATE[:0]}),
    ("gate", {"residual": RESIDUAL, "gate": GATE[:, :-8]}),
    ("gate", {"residual": RESIDUAL, "gate": GATE[0]}),
    ("gate", {"residual": RESIDUAL, "gate": GATE.half()}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparse_linear(**product(torch.float32), **change)
    assert (caught.value.op, caught.value.argument) == ("sparse_linear", argument)


def test_residual_and_gate_count_for_the_way_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    monkeypatch.setattr(ops, "direct", lambda *tensors: asked.extend(tensors))
    ops.sparse_linear(**product(torch.float32), residual=RESIDUAL, gate=GATE)
    assert any(t is RESIDUAL for t in asked) and any(t is GATE for t in asked)


# ---- the layer --------------------------------------------------------------------------------------------------------------------------


def layer(**options: Any) -> SparseLinear:
    torch.manual_seed(0)
    made = SparseLinear.from_linear(nn.Linear(K, N), SparsityConfig(**{"small_m": "sparse", **options}))
    if made.branch != "none":
        made.set_compensation(torch.randn(K, R) / 8, torch.randn(N, R) / 8, torch.randn(K))
    return made


def block_inputs(with_gate: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(2)
    return torch.randn(B, S, K), torch.randn(B, S, N), torch.randn(B, 2 * N)[:, N:] if with_gate else None


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every product that a layer computes: whether it was given a residual."""
    seen: list[bool] = []
    multiply = ops.sparse_linear

    def recorded(*arguments: Any) -> Tensor:
        seen.append(arguments[10] is not None)
        return multiply(*arguments)

    monkeypatch.setattr(linear.ops, "sparse_linear", recorded)
    return seen


@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("options", [{}, {"branch": "none"}, {"precision": "fp8"}], ids=str)
@torch.no_grad()
def test_a_layer_adds_to_the_residual(options: dict[str, Any], with_gate: bool, epilogues: list[bool]) -> None:
    sparse, (x, residual, gate) = layer(**options), block_inputs(with_gate)
    got = sparse.forward_gated(x, residual, gate)
    update = sparse(x)
    want = residual + (update if gate is None else gate.unsqueeze(1) * update)
    assert epilogues == [True, False]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", ["dense", "gradients", "strided"])
def test_where_the_product_does_not_it_is_added_in_steps(why: str, epilogues: list[bool]) -> None:
    sparse, (x, residual, gate) = layer(), block_inputs()
    assert gate is not None
    sparse.dense = why == "dense"
    if why == "strided":
        residual = torch.cat([residual, residual], -1)[..., :N]
    with torch.set_grad_enabled(why == "gradients"):
        assert torch.equal(sparse.forward_gated(x, residual, gate), residual + gate.unsqueeze(1) * sparse(x))
    assert not any(epilogues)


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_after_an_activation_as_well(dense: bool, epilogues: list[bool]) -> None:
    sparse, (x, residual, gate) = layer(), block_inputs()
    assert gate is not None
    sparse.dense = dense
    got = sparse.forward_activated(x, "gelu_tanh", residual=residual, residual_gate=gate)
    torch.testing.assert_close(got, residual + gate.unsqueeze(1) * sparse.forward_activated(x, "gelu_tanh"), rtol=1e-5, atol=1e-5)
    assert epilogues == ([] if dense else [True, False])


@pytest.mark.parametrize(
    "argument, change",
    [
        ("residual", {"residual": torch.randn(B, S, K)}),
        ("residual", {"residual": torch.randn(B, S, N).half()}),
        ("gate", {"gate": torch.randn(1, N)}),
        ("gate", {"gate": torch.randn(B, 1, N)}),
        ("x", {"x": torch.randn(M, K), "residual": RESIDUAL}),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_layers_refuse(dense: bool, argument: str, change: dict[str, Tensor]) -> None:
    sparse, names = layer(), ("x", "residual", "gate")
    sparse.dense = dense
    given = dict(zip(names, block_inputs(), strict=True)) | change
    with pytest.raises(InvalidArgumentError) as caught:
        sparse.forward_gated(**given)  # type: ignore[arg-type]
    assert (caught.value.op, caught.value.argument) == ("SparseLinear.forward_gated", argument)
    with pytest.raises(InvalidArgumentError) as caught:
        sparse.forward_activated(given["x"], "gelu_tanh", residual=given["residual"], residual_gate=given["gate"])
    assert (caught.value.op, caught.value.argument) == ("SparseLinear.forward_activated", argument.replace("gate", "residual_gate"))
