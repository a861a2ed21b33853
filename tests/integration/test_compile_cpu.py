"""`torch.compile` traces sparse layers without graph breaks and without recompiling for every number of tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from sparse_models import MODELS, sparse
from tiny_models import TINY, output


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def layer(config: SparsityConfig | None = None) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear.from_linear(nn.Linear(128, 64), config)
    layer.set_compensation(torch.randn(128, 16) / 8, torch.randn(64, 16) / 8, torch.randn(128))
    return layer


@pytest.mark.parametrize("selection", ["magnitude", "weight"])
def test_one_graph_serves_any_number_of_tokens(selection: str) -> None:
    eager = layer(SparsityConfig(selection=selection))  # type: ignore[arg-type]
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 64, 131):
        x = torch.randn(2, tokens, 128)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_few_tokens_and_many_are_a_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a layer with few tokens runs dense; on the CPU none would."""
    monkeypatch.setattr("rtlynx.least_tokens._least_tokens", lambda *_arguments: 64)
    eager = layer()
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens, graphs in ((5, 1), (40, 1), (64, 2), (131, 2), (63, 2), (7, 2), (200, 2)):
        x = torch.randn(tokens, 128)
        dense = nn.functional.linear(x, eager.weight, eager.bias)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
        assert ((eager(x) - dense).norm() < 1e-4) == (tokens < 64)
        assert counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_a_block_has_a_graph_for_every_range_between_its_layers_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtlynx.least_tokens._least_tokens", lambda _device, n, *_others: n)
    torch.manual_seed(0)
    block = nn.Sequential(*(SparseLinear.from_linear(nn.Linear(k, n)) for k, n in ((64, 128), (128, 64), (64, 128))))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens, graphs in ((200, 1), (130, 1), (100, 2), (64, 2), (63, 3), (127, 3), (500, 3), (3, 3)):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == graphs


def test_gradients_through_compiled_layers() -> None:
    eager = layer()
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (eager, compiled):
        x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None and eager.weight.grad is not None
        gradients.append((x.grad, eager.weight.grad.clone()))
        eager.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1])


def sizes(family: str) -> list[dict[str, Any]]:
    """Inputs with three numbers of tokens, of the text too except in Wan, whose text is always as long."""
    make = MODELS[family].inputs
    side = inspect.signature(make).parameters["side"].default
    texts = [{}] * 3 if family == "wan" else [{"text": text} for text in (19, 7, 70)]
    step = 8 if family == "z_image" else 2  # which pads to multiples of 32 tokens
    grown = side - 2 * step if family == "sd3" else side + step  # of which the default is the largest picture
    sides = (side, side - step, grown)
    return [make("cpu", torch.float32, side=side, **text) for side, text in zip(sides, texts, strict=True)]  # type: ignore[call-arg]


@pytest.mark.parametrize("family", sorted(set(MODELS) - {"sd3", "pixart"}))  # of which diffusers names no repeated blocks
def test_repeated_blocks_serve_every_size(family: str) -> None:
    model = sparse(family)
    want = [output(model, inputs) for inputs in sizes(family)]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for i, inputs in enumerate(sizes(family)):  # the second size makes sizes symbolic
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            torch.testing.assert_close(output(model, inputs), want[i], rtol=1e-4, atol=1e-4)


def graphs_of_a_whole_model(model: Any, family: str) -> list[int]:
    """How many there are of it after each size, compiled without a break and computing what it does eagerly."""
    torch._dynamo.reset()
    counters.clear()
    want = [output(model, inputs) for inputs in sizes(family)]
    # What comes after capturing takes longer and is the same in every model.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if family == "flux" else "eager")
    graphs = []
    for inputs, eager in zip(sizes(family), want, strict=True):
        torch.testing.assert_close(output(compiled, inputs), eager, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("family", MODELS)
def test_a_whole_model_is_one_graph_for_every_size(family: str) -> None:
    if family == "z_image" and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 computes something else of the second size, of the dense model too")
    graphs = graphs_of_a_whole_model(sparse(family), family)
    if family == "qwen_image":  # one for every length of the text, dense too
        assert graphs == graphs_of_a_whole_model(MODELS[family].build("cpu", torch.float32), family) == [1, 2, 3]
    else:
        assert graphs == [1, 2, 2]  # the second size makes sizes symbolic


def test_an_attention_backend_chosen_after_compiling() -> None:
    model, inputs = sparse("flux"), TINY["flux"].inputs("cpu", torch.float32)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    want = output(model, inputs)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(output(model, inputs), want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sums_behind_products_are_left_to_inductor() -> None:
    tiny = TINY["flux"]
    model = rtlynx.apply(tiny.build("cpu", torch.bfloat16), SparsityConfig(small_m="sparse"))
    inputs = tiny.inputs("cpu", torch.bfloat16)
    want = output(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(lambda: output(model, inputs))
    calls = [line for graph in code for line in graph.splitlines() if "rtlynx_into.sparse_linear_cpu(" in line]
    assert calls and not any("'none', " in call for call in calls)  # what a residual would come behind
    assert (got - want).norm() / want.norm() < 2e-2  # bfloat16, rounded less often


def test_calibrating_a_compiled_model_sees_its_activations() -> None:
    tiny = TINY["flux"]
    model, inputs = rtlynx.apply(tiny.build("cpu", torch.float32), SparsityConfig(rank=16)), tiny.inputs("cpu", torch.float32)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")  # type: ignore[operator]
    before = output(model, inputs)  # traced without hooks
    rtlynx.calibrate(model, run=lambda: output(model, inputs), progress=False)
    assert all(m.rank == 16 for m in model.modules() if isinstance(m, SparseLinear))
    after = output(model, inputs)  # and retraced with the branch
    assert not torch.equal(after, before)
