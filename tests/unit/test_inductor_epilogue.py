"""A compiled block's ``residual + gate · layer(x)`` is one call, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from rtlynx import SparseLinear, SparsityConfig

B, S, N, K, R = 2, 19, 64, 128, 16
Join = Callable[[Tensor, Tensor, Tensor], Tensor]
JOINS: dict[str, Join] = {
    "residual + gate * y": lambda residual, gate, y: residual + gate.unsqueeze(1) * y,
    "residual + y * gate": lambda residual, gate, y: residual + y * gate.unsqueeze(1),
    "gate * y + residual": lambda residual, gate, y: gate.unsqueeze(1) * y + residual,
    "y * gate + residual": lambda residual, gate, y: y * gate.unsqueeze(1) + residual,
}


class Block(nn.Module):
    """What a transformer block does with a layer's output: the residual is computed here, the gate is a piece of something wider."""

    def __init__(self, join: Join, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = SparseLinear(K, N, dtype=torch.bfloat16, config=SparsityConfig(**{"small_m": "sparse", **options}))
        if self.layer.branch != "none":
            self.layer.set_compensation(torch.randn(K, R) / 8, torch.randn(N, R) / 8, torch.randn(K) / 4)
        self.join = join

    def forward(self, x: Tensor, residual: Tensor, modulation: Tensor) -> Tensor:
        gate = torch.tanh(modulation).chunk(3, 1)[1]
        return self.join(torch.relu(residual), gate, self.layer(x)) * 2


def inputs(samples: int = B, tokens: int = S, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(samples, tokens, K).bfloat16()
    return x, torch.randn(samples, tokens, N).to(dtype), torch.randn(samples, 3 * N).bfloat16()


def compiled(block: Callable[..., Any], *given: Tensor, **options: Any) -> tuple[Any, list[str]]:
    """The result, and the calls of the product in the code."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        result, code = run_and_get_code(torch.compile(block, fullgraph=True, **options), *given)
    return result, [line for line in code[0].splitlines() if "rtlynx.sparse_linear_into.default(" in line]


def fused(call: str) -> bool:
    return "'none', " in call


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("join", JOINS)
@torch.no_grad()
def test_one_call_adds_to_the_residual(join: str, samples: int) -> None:
    block, given = Block(JOINS[join]), inputs(samples)
    got, calls = compiled(block, *given)
    assert len(calls) == 1 and fused(calls[0])
    torch.testing.assert_close(got, block(*given), rtol=2**-7, atol=2**-7)  # eager rounds the product of gate and y as well
    x, residual, modulation = given
    gate = torch.tanh(modulation).chunk(3, 1)[1].contiguous()
    assert torch.equal(got, block.layer.forward_gated(x, torch.relu(residual), gate) * 2)


@pytest.mark.parametrize("options", [{"branch": "none"}, {"precision": "fp8"}], ids=str)
@torch.no_grad()
def test_every_kind_of_layer(options: dict[str, Any]) -> None:
    block, given = Block(JOINS["residual + gate * y"], **options), inputs()
    got, calls = compiled(block, *given)
    assert len(calls) == 1 and fused(calls[0])
    torch.testing.assert_close(got, block(*given), rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_any_number_of_tokens_and_samples() -> None:
    block = Block(JOINS["residual + gate * y"])
    torch._dynamo.reset()
    call = torch.compile(block, fullgraph=True)
    x, residual, _ = given = inputs()
    for tensor in given:
        torch._dynamo.mark_dynamic(tensor, 0)
    for tensor in (x, residual):
        torch._dynamo.mark_dynamic(tensor, 1)
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, code = run_and_get_code(call, *given)
    assert any(fused(line) for line in code[0].splitlines() if "rtlynx.sparse_linear_into.default(" in line)
    for samples, tokens in ((2, 33), (5, 7), (3, 64)):
        given = inputs(samples, tokens)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(call(*given), block(*given), rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_two_in_a_row() -> None:
    first, second = Block(JOINS["residual + gate * y"]), Block(JOINS["y * gate + residual"])

    def blocks(x: Tensor, residual: Tensor, modulation: Tensor) -> Tensor:
        return second(x + 1, first(x, residual, modulation), modulation)

    got, calls = compiled(blocks, *inputs())
    assert len(calls) == 2 and all(map(fused, calls))
    torch.testing.assert_close(got, blocks(*inputs()), rtol=2**-6, atol=2**-6)


PLAIN = JOINS["residual + gate * y"]
OTHERS: dict[str, tuple[Join, torch.dtype]] = {
    "y is used again": (lambda residual, gate, y: PLAIN(residual, gate, y) * y.sigmoid(), torch.bfloat16),
    "the update is scaled": (lambda residual, gate, y: torch.add(residual, gate[:, None] * y, alpha=2), torch.bfloat16),
    "a residual of float32": (PLAIN, torch.float32),
    "a gate for every token": (lambda residual, gate, y: residual + residual.sigmoid() * y, torch.bfloat16),
    "a gate that is a number": (lambda residual, gate, y: residual + 0.5 * y, torch.bfloat16),
    "a number for every sample": (lambda residual, gate, y: residual + gate[:, None, :1] * y, torch.bfloat16),
    "a gate without samples": (lambda residual, gate, y: residual + gate[0] * y, torch.bfloat16),
    "one residual for all samples": (lambda residual, gate, y: residual[:1] + gate[:, None] * y, torch.bfloat16),
    "a strided residual": (lambda residual, gate, y: torch.cat([residual, residual], -1)[..., :N] + gate[:, None] * y, torch.bfloat16),
}
"""What the product cannot do, and the dtype of the residual."""


@pytest.mark.parametrize("how", OTHERS)
@torch.no_grad()
def test_what_the_product_cannot_do_stays_as_it_is(how: str) -> None:
    join, dtype = OTHERS[how]
    block, given = Block(join), inputs(dtype=dtype)
    got, calls = compiled(block, *given)
    assert len(calls) == 1 and not fused(calls[0])
    torch.testing.assert_close(got, block(*given), rtol=2**-6, atol=2**-6)


def test_gradients_are_those_of_the_steps() -> None:
    block = Block(JOINS["residual + gate * y"])

    def gradients(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in inputs()]
        return torch.autograd.grad(call(*leaves).float().square().sum(), leaves)

    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        got = gradients(torch.compile(block, fullgraph=True))
    for a, b in zip(got, gradients(block), strict=True):
        assert (a - b).norm() / b.norm() < 2e-2  # bfloat16, rounded at other places
