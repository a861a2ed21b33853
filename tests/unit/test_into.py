"""What compiled code calls instead of the public ops: memory that inductor plans, written by a launch."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, _core, inductor, into, launch, ops, reference

M, N, K, R = 33, 128, 256, 16
E4M3 = torch.float8_e4m3fn


def layers(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    config = SparsityConfig(small_m="sparse", **options)
    made = [SparseLinear(k, n, dtype=torch.bfloat16, config=config) for n, k in ((N, K), (K, N), (64, K))]
    for layer in made:
        n, k = layer.weight.shape
        if layer.branch != "none":
            layer.set_compensation(torch.randn(k, R) / 16, torch.randn(n, R) / 4, torch.randn(k) / 4)
    return nn.Sequential(*made)


def compiled(call: Any, *inputs: Any, dynamic: bool = False) -> tuple[Any, str]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        result, (code,) = run_and_get_code(torch.compile(call, fullgraph=True, dynamic=dynamic), *inputs)
    return result, code


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [({}, False), ({}, True), ({"branch": "none"}, False), ({"norm_compensation": False}, False), ({"precision": "fp8"}, True)],
)
@torch.no_grad()
def test_compiled_layers_write_into_memory_of_inductor(options: dict[str, Any], dynamic: bool) -> None:
    model, x = layers(**options), torch.randn(M, K).bfloat16()
    got, code = compiled(model, x, dynamic=dynamic)
    assert (code.count("rtlynx_into.sparsify_cpu("), code.count("rtlynx_into.sparse_linear_cpu(")) == (3, 3)
    assert "rtlynx.sparsify.default(" not in code and "rtlynx.sparse_linear.default(" not in code
    assert "cpp_fused" not in code  # what is written into is not filled first, nor are biases added
    assert torch.equal(got, model(x))


def calls(code: str) -> list[str]:
    """What is allocated, written, used again and freed, in order."""
    return [line.strip() for line in code.splitlines() if "buf" in line]


def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inductor whose code has no imports of others."""

    def absent(wrapper: object) -> None:
        raise AttributeError("add_import_once")

    monkeypatch.setattr(PythonWrapperCodegen, "add_import_once", property(absent, lambda wrapper, value: None), raising=False)


def other_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inductor that wants more to be said of an import."""
    add = property(lambda wrapper: lambda line, name: None, lambda wrapper, value: None)
    monkeypatch.setattr(PythonWrapperCodegen, "add_import_once", add, raising=False)


def other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a kind of device that has no function."""
    monkeypatch.setattr(into, "FUNCTIONS", {})


@pytest.mark.parametrize("lacking", [no_imports, other_imports, other_device])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_without_a_way_past_the_dispatcher_the_op_is_called(lacking: Any, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(), torch.randn(M, K).bfloat16()
    _, direct = compiled(model, x, dynamic=dynamic)
    assert direct.count("from rtlynx import into as rtlynx_into") == 1
    lacking(monkeypatch)
    got, code = compiled(model, x, dynamic=dynamic)
    assert "rtlynx_into" not in code and torch.equal(got, model(x))
    # To inductor both are the op: it does the same with memory and in the same order.
    for op in ("sparsify", "sparse_linear"):
        code = code.replace(f"torch.ops.rtlynx.{op}_into.default(", f"rtlynx_into.{op}_cpu(")
    assert len(calls(code)) > 20 and calls(code) == calls(direct)


def test_a_function_has_the_arguments_of_its_op() -> None:
    for (op, _), name in into.FUNCTIONS.items():
        parameters = inspect.signature(getattr(into, name)).parameters.values()
        defaults = [inspect.Parameter.empty if not a.has_default_value() else a.default_value for a in op._schema.arguments]
        assert [(p.name, p.default) for p in parameters] == [(a.name, d) for a, d in zip(op._schema.arguments, defaults, strict=True)]


@torch.no_grad()
def test_writes_stay_in_order() -> None:
    first, second, last = layers()[0], layers()[0], layers()[1]

    def call(x: Tensor) -> tuple[Tensor, ...]:
        a, b = first(x), second(x)
        x.mul_(2)
        c = first(x)
        return a, last(b + c), b.add_(a), c

    x = torch.randn(M, K).bfloat16()
    mine, theirs = x.clone(), x.clone()
    got, code = compiled(call, mine)
    # run_and_get_code runs the code once, so x is written to once, as in the eager call.
    for a, b in zip((*got, mine), (*call(theirs), theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert code.count("rtlynx_into.sparse_linear_cpu(") == 4


@torch.no_grad()
def test_literals_are_written_out() -> None:
    x = torch.randn(M, K).bfloat16()

    def select(x: Tensor) -> tuple[Tensor, ...]:
        return ops.sparsify(x, eps=1 / 3e7, values_dtype=E4M3, values_scale=2.0**-9, activation="gelu_tanh")

    _, code = compiled(select, x)
    (call,) = [line for line in calls(code) if "sparsify_cpu(" in line]
    assert f"True, {1 / 3e7!r}, {2.0**-9!r}, 'gelu_tanh', None" in call  # shortest digits that give the same float


@torch.no_grad()
def test_cached_code_brings_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(), torch.randn(M, K).bfloat16()
    with fresh_inductor_cache(), torch._inductor.config.patch(fx_graph_cache=True):
        for run in range(2):
            torch._dynamo.reset()
            torch._inductor.codecache.PyCodeCache.cache_clear()
            counters.clear()
            assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
            assert counters["inductor"]["fxgraph_cache_hit"] == run
            monkeypatch.setattr(inductor, "_call", None)  # nothing is lowered again


@torch.no_grad()
def test_a_graph_in_a_graph_calls_as_well() -> None:
    model, x = layers(), torch.randn(M, K).bfloat16()

    def call(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: model[0](x), lambda x: model[0](-x), (x,))  # type: ignore[no-any-return]

    for input in (x.abs(), -x.abs()):
        got, code = compiled(call, input)
        assert code.count("rtlynx_into.sparse_linear_cpu(") == 2
        assert torch.equal(got, call(input))


@torch.no_grad()
def test_memory_is_used_again() -> None:
    _, code = compiled(layers(), torch.randn(M, K).bfloat16())
    assert code.count("# reuse") >= 3


@torch.no_grad()
def test_all_outputs_may_be_wanted() -> None:
    x, down = torch.randn(M, K).bfloat16(), torch.randn(K, R).bfloat16()

    def select(x: Tensor) -> tuple[Tensor, ...]:
        return (*ops.sparsify(x, comp_down=down, values_dtype=E4M3, values_scale=0.5), *ops.sparsify(x, norm_compensation=False))

    got, code = compiled(select, x)
    assert code.count("rtlynx_into.sparsify_cpu(") == 2
    for a, b in zip(got, select(x), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_gradients_through_compiled_layers() -> None:
    model, x = layers(), torch.randn(M, K).bfloat16()

    def gradient(call: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        call(leaf).float().square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    torch._dynamo.reset()
    torch.testing.assert_close(gradient(torch.compile(model, fullgraph=True)), gradient(model))


@torch.no_grad()
def test_what_is_not_contiguous_goes_to_the_op_that_checks() -> None:
    sparse = reference.sparsify(torch.randn(M, K).bfloat16())
    weight = torch.randn(K, N).bfloat16().T

    def multiply(values: Tensor, metadata: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return ops.sparse_linear(values, metadata, weight, scale)

    with pytest.raises(InvalidArgumentError, match=r"`weight`.*contiguous"):  # the op that writes into memory would not look
        compiled(multiply, sparse.values, sparse.metadata, weight, sparse.row_scale)


def test_bad_input_is_refused_by_the_trace() -> None:
    torch._dynamo.reset()
    with pytest.raises((InvalidArgumentError, torch._dynamo.exc.TorchRuntimeError), match="comp_down"):
        torch.compile(ops.sparsify, fullgraph=True)(torch.randn(M, K).bfloat16(), comp_down=torch.randn(K, 8).bfloat16())


def recorded(monkeypatch: pytest.MonkeyPatch, op: str) -> list[dict[str, Any]]:
    """What the extension's function is given, by the names of its parameters."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(getattr(_core, op))
    record = SimpleNamespace(**{op: lambda *arguments: calls.append(dict(signature.bind(*arguments).arguments))})
    monkeypatch.setattr(launch, "core", lambda: record)
    monkeypatch.setattr(launch, "stream", lambda index: 7)
    return calls


@pytest.mark.parametrize("full", [True, False])
def test_selection_is_given_its_arguments_in_their_places(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "sparsify")
    wide = torch.zeros(M, 3 * K).bfloat16()
    x, gate, head = wide[:, :K], wide[:, K : 2 * K], torch.zeros(M, 64).bfloat16()
    none = {"norm_rows": 0, "norm_stats": 0, "norm_weight": 0, "norm_bias": 0}
    score, shift, down = torch.ones(K + 64), torch.zeros(K + 64), torch.zeros(K + 64, R).bfloat16()
    places = torch.zeros(K + 64, dtype=torch.uint8)
    values, metadata = torch.zeros(M, (K + 64) // 2, dtype=E4M3), torch.zeros(1, 5, 32, 4, dtype=torch.int32)
    scale, branch = torch.zeros(M), torch.zeros(M, R).bfloat16()
    named = {"gate": gate, "head": head, "score": score, "shift": shift, "comp_down": down, "row_scale": scale, "branch": branch}
    named |= {"places": places}
    of = named if full else dict.fromkeys(named)
    inputs = of["gate"], of["head"], of["score"], of["shift"], of["comp_down"]
    launch.sparsify(x, *inputs, values, metadata, of["row_scale"], of["branch"], True, 1e-8, 0.5, "silu_gate", places=of["places"])
    rows = (
        {"ldx": 3 * K, "ld_gate": 3 * K, "head_k": 64, "ld_head": 64} if full else {"ldx": 3 * K, "ld_gate": 0, "head_k": 0, "ld_head": 0}
    )
    addresses = {name: tensor.data_ptr() if full else 0 for name, tensor in named.items()}
    addresses |= {"x": x.data_ptr(), "values": values.data_ptr(), "metadata": metadata.data_ptr()}
    options = {"activation": "silu_gate", "branch_of_dropped": True, "eps": 1e-8, "values_scale": 0.5, "rank": R if full else 0}
    place = {"device_index": -1, "stream": 7, "dtype": "bfloat16_e4m3", "m": M, "k": K + 64}
    assert calls == [place | rows | addresses | options | none]


def test_selection_is_given_a_copy_of_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "sparsify")
    wide = torch.zeros(M, 3 * K).bfloat16()
    x, gate, head = wide[:, 1 : K + 1], wide[:, : 2 * K : 2], torch.zeros(64, M).bfloat16().T
    values, metadata = torch.zeros(M, (K + 64) // 2).bfloat16(), torch.zeros(1, 5, 32, 4, dtype=torch.int32)
    launch.sparsify(x, gate, head, None, None, None, values, metadata, None, None, True, 0.0, 1.0, "silu_gate")
    (call,) = calls
    assert (call["k"], call["ldx"], call["ld_gate"], call["head_k"], call["ld_head"]) == (K + 64, K, K, 64, 64)
    assert not {call["x"], call["gate"], call["head"]} & {x.data_ptr(), gate.data_ptr(), head.data_ptr(), 0}


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_a_norm_is_given_its_arguments_in_their_places(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "sparsify")
    x, values, metadata = torch.zeros(M, K).bfloat16(), torch.zeros(M, K // 2).bfloat16(), torch.zeros(1, 4, 32, 4, dtype=torch.int32)
    stats, weight, bias = torch.zeros(M, 2), None, None
    if samples:
        weight, bias = torch.zeros(samples, K).bfloat16(), torch.zeros(samples, 2 * K).bfloat16()[:, K:]
    launch.sparsify(x, *[None] * 5, values, metadata, None, None, False, 0.0, 1.0, "none", stats, weight, bias)
    (call,) = calls
    assert (call["activation"], call["norm_rows"], call["norm_stats"]) == ("norm", M // max(samples, 1), stats.data_ptr())
    assert call["norm_weight"] == (0 if weight is None else weight.data_ptr())
    if samples == 1:
        assert bias is not None and call["norm_bias"] == bias.data_ptr()  # one row of a wider tensor is contiguous
    else:
        assert bool(call["norm_bias"]) == bool(samples)  # several are copied
    assert (call["x"], call["gate"], call["head"], call["head_k"]) == (x.data_ptr(), 0, 0, 0)


def test_statistics_are_given_their_arguments_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "row_stats")
    x, stats = torch.zeros(M, 3 * K).half()[:, K : 2 * K], torch.zeros(M, 2)
    launch.row_stats(x, stats, True, 1e-6)
    place = {"device_index": -1, "stream": 7, "dtype": "float16", "m": M, "k": K, "ldx": 3 * K}
    assert calls == [place | {"x": x.data_ptr(), "stats": stats.data_ptr(), "centered": True, "eps": 1e-6}]
    launch.row_stats(x[:0], stats[:0], True, 1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("full", [True, False])
def test_the_product_is_given_its_arguments_in_their_places(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch, "sparse_linear")
    values, metadata, weight = torch.zeros(M, K // 2, dtype=E4M3), torch.zeros(1, 4, 32, 4), torch.zeros(N, K, dtype=E4M3)
    scale, weight_scale, bias = torch.zeros(M), torch.zeros(N), torch.zeros(N).bfloat16()
    branch, up, out = torch.zeros(M, R).bfloat16(), torch.zeros(N, R).bfloat16(), torch.zeros(M, N).bfloat16()
    named = {"row_scale": scale, "branch": branch, "comp_up": up, "bias": bias, "weight_scale": weight_scale}
    after = {"residual": torch.zeros(M, N).bfloat16(), "gate": torch.zeros(3, N).bfloat16()}
    epilogue = ("gelu_tanh", *after.values()) if full else ()
    launch.sparse_linear(values, metadata, weight, *(named if full else dict.fromkeys(named)).values(), out, *epilogue)  # type: ignore[arg-type]
    addresses = {name: tensor.data_ptr() if full else 0 for name, tensor in (named | after).items()}
    addresses |= {"values": values.data_ptr(), "metadata": metadata.data_ptr(), "weight": weight.data_ptr(), "out": out.data_ptr()}
    problem = {"device_index": -1, "stream": 7, "dtype": "bfloat16_e4m3", "m": M, "n": N, "k": K, "rank": R if full else 0}
    epilogue_options = {"activation": "gelu_tanh" if full else "none", "gates": 3 if full else 0}
    assert calls == [problem | addresses | epilogue_options]
