"""Shared selections on a GPU: streams, CUDA graphs, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only

import rtlynx
from rtlynx import SparseLinear, ops, reference
from rtlynx.bench.random_model import random_compensation
from rtlynx.row_stats import row_stats
from rtlynx.select_normed import select_normed
from tiny_models import TINY, output, relative_error

K, N, M = 256, 128, 512


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(K, N, device="cuda", dtype=torch.bfloat16) for _ in range(3))


class FluxTransformer2DModel(nn.Module):
    """Found by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()})])


@pytest.fixture
def attn() -> Any:
    model = rtlynx.apply(FluxTransformer2DModel(), rtlynx.SparsityConfig(small_m="sparse"))
    random_compensation(model, 64)
    return model.transformer_blocks[0]["attn"]  # type: ignore[index]


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    count: list[None] = []
    sparsify: Callable[..., Any] = ops.sparsify

    def counting(*args: Any, **kwargs: Any) -> Any:
        count.append(None)
        return sparsify(*args, **kwargs)

    monkeypatch.setattr(ops, "sparsify", counting)
    return count


def tokens() -> Tensor:
    return torch.randn(1, M, K, device="cuda", dtype=torch.bfloat16)


def alone(layer: SparseLinear, x: Tensor) -> Tensor:
    group, layer.input_group = layer.input_group, None
    try:
        return layer(x)
    finally:
        layer.input_group = group


@torch.no_grad()
def test_one_selection_serves_all(attn: Any, selections: list[None]) -> None:
    x = tokens()
    outputs = [layer(x) for layer in (attn.to_q, attn.to_k, attn.to_v)]
    assert len(selections) == 1 and attn.to_q.input_group._kept is None
    for layer, got in zip((attn.to_q, attn.to_k, attn.to_v), outputs, strict=True):
        assert torch.equal(got, alone(layer, x))


@torch.no_grad()
def test_another_stream_selects_for_itself(attn: Any, selections: list[None]) -> None:
    x = tokens()
    attn.to_q(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = attn.to_k(x)
    torch.cuda.current_stream().wait_stream(side)
    assert len(selections) == 2
    assert torch.equal(got, alone(attn.to_k, x))


@torch.no_grad()
def test_a_graph_holds_its_own_selection(attn: Any) -> None:
    x = tokens()
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        layer(x)  # loads the kernels
    attn.to_q(x)  # kept, outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        k, v = attn.to_k(x), attn.to_v(x)
    q = attn.to_q(x)  # not from what the capture kept: nothing has run yet
    assert torch.equal(q, alone(attn.to_q, x))
    for _ in range(2):
        x.copy_(tokens())
        graph.replay()
        assert torch.equal(k, alone(attn.to_k, x)) and torch.equal(v, alone(attn.to_v, x))


@torch.no_grad()
def test_one_selection_from_a_norm_serves_all(attn: Any, selections: list[None]) -> None:
    h, weight, bias = tokens(), *torch.randn(2, K, device="cuda", dtype=torch.bfloat16)
    stats = row_stats(h[0])
    x = reference.normed(h[0], stats, weight[None], bias[None])[None]
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        assert layer.takes_norm(M, h.device)
        got = layer.multiply(select_normed(layer, h, stats, weight, bias), h.dtype, h.shape[:-1])
        assert torch.equal(got, alone(layer, x))
    assert len(selections) == 1 + 3


@torch.no_grad()
def test_a_norm_in_compiled_code(attn: Any) -> None:
    def project(h: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        stats, weight = row_stats(h.flatten(0, 1)), 1 + scale
        layers = attn.to_q, attn.to_k, attn.to_v
        return [layer.multiply(select_normed(layer, h, stats, weight, bias), h.dtype, h.shape[:-1]) for layer in layers]

    h, scale, bias = torch.randn(2, M, K, device="cuda").bfloat16(), *torch.randn(2, 2, K, device="cuda").bfloat16()
    torch._dynamo.reset()
    got, (code,) = run_and_get_code(torch.compile(project, fullgraph=True), h, scale, bias)
    assert code.count("rtlynx_into.sparsify_cuda(") == 1 and "rtlynx.row_stats" not in code
    for a, b in zip(got, project(h, scale, bias), strict=True):
        assert relative_error(a, b) < 1e-2  # the statistics' last bits


def selecting_model(family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    tiny = TINY[family]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    rtlynx.apply(model, rtlynx.SparsityConfig(small_m="sparse"))
    random_compensation(model, 64)
    torch._dynamo.reset()
    return model, inputs


# Compiled code keeps in float32 what eager rounds between operations, and one rounding flips near-ties of every later selection.
# Here it rounds where eager does, so that what differs is the graph and not the chaos.
@pytest.fixture(autouse=True)
def compiled_code_rounds_like_eager() -> Iterator[None]:
    with torch._inductor.config.patch(emulate_precision_casts=True, fx_graph_cache=False):
        yield


@pytest.mark.parametrize("family", sorted(TINY))
def test_compiled_blocks_select_once(family: str) -> None:
    model, inputs = selecting_model(family)
    eager = output(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    got, code = run_and_get_code(lambda: output(model, inputs).clone())
    assert relative_error(got, eager) < 3e-2
    assert code
    for block in code:
        layers = block.count("rtlynx_into.sparse_linear_cuda(")
        assert layers == 0 or block.count("rtlynx_into.sparsify_cuda(") == {12: 8, 5: 2, 7: 4}[layers]


@pytest.mark.parametrize("family", sorted(TINY))
def test_a_compiled_model_runs_as_a_cuda_graph(family: str) -> None:
    model, inputs = selecting_model(family)
    others = tree_map_only(Tensor, lambda x: x.flip(-1) if x.is_floating_point() and x.dim() > 1 else x, inputs)
    given = [inputs] * 3 + [others, inputs]  # warm-up, capture, replays
    want = [output(model, each) for each in given]
    compiled = torch.compile(model, mode="reduce-overhead")
    for each, eager in zip(given, want, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_error(output(compiled, each), eager) < 3e-2
