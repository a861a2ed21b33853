"""A norm before a selection, in it: statistics of rows, what is selected from, gradients, tracing, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, _core, ops, reference, row_stats
from rtlynx.activations import selection_norms
from rtlynx.reference import E4M3

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K = 128


def inputs(m: int, samples: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """h, weight and bias; weight and bias as a chunk of one tensor, as modulations are."""
    torch.manual_seed(m)
    h = torch.randn(m, K) * torch.exp(torch.randn(K)) + 3
    scale, shift = torch.randn(samples, 2 * K).chunk(2, 1)
    return h.to(dtype), (1 + scale).to(dtype), shift.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False])
def test_statistics_are_those_of_torchs_norms(centered: bool, dtype: torch.dtype) -> None:
    h, _, _ = inputs(37, dtype=dtype)
    stats = row_stats.row_stats(h, centered, 1e-5)
    assert stats.dtype == torch.float32 and stats.shape == (37, 2)
    norm = F.layer_norm if centered else F.rms_norm
    want = norm(h.double(), (K,), eps=1e-5)
    torch.testing.assert_close((h.double() - stats[:, :1]) * stats[:, 1:], want, rtol=1e-5, atol=1e-5)
    assert centered or not stats[:, 0].any()


def test_statistics_of_a_large_mean_are_exact() -> None:
    h = 1e4 + torch.randn(9, 1024)
    want = torch.stack([h.double().mean(1), (h.double().var(1, correction=0) + 1e-6).rsqrt()], 1)
    torch.testing.assert_close(row_stats.row_stats(h).double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_selected_from(samples: int, dtype: torch.dtype) -> None:
    h, weight, bias = inputs(36, samples, dtype)
    stats = reference.row_stats(h, True, 1e-6)
    got = reference.normed(h, stats, weight, bias)
    assert got.dtype == dtype
    for b, rows in enumerate(range(0, 36, 36 // samples)):
        part = slice(rows, rows + 36 // samples)
        want = F.layer_norm(h[part].double(), (K,), weight[b].double(), bias[b].double(), 1e-6)
        torch.testing.assert_close(got[part].double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("values_dtype", [None, E4M3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["neither", "weight", "bias", "both", "one dimension"])
def test_the_rest_is_as_without(given: str, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    h, weight, bias = inputs(21, 1 if given == "one dimension" else 3, dtype)
    stats = row_stats.row_stats(h)
    norm = weight if given not in ("neither", "bias") else None, bias if given not in ("neither", "weight") else None
    score, shift, down = torch.rand(K), torch.randn(K), torch.randn(K, 16).to(dtype)
    selection = score, shift, down, "dropped", True, 1e-8, values_dtype, 2.0 if values_dtype else 1.0
    want = ops.sparsify(reference.normed(h, stats, *norm), *selection)
    if given == "one dimension":
        norm = weight[0], bias[0]
    got = ops.sparsify(h, *selection, "none", None, None, stats, *norm)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        h, weight, bias = (t.detach().clone() for t in inputs(9, 3, dtype))
        stats = reference.row_stats(h)
        if dtype is torch.float32:
            for tensor in (h, weight, bias, stats):
                tensor.requires_grad_()
        down = torch.randn(K, 16).to(dtype)
        args = h, None, None, down, "dropped", True, 1e-8, None, 1.0, "none", None, None, stats, weight, bias
        torch.library.opcheck(torch.ops.rtlynx.sparsify.default, args)
        for centered in (True, False):
            torch.library.opcheck(torch.ops.rtlynx.row_stats.default, (h, centered, 1e-6))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_gradients_are_those_of_the_norm_before_the_op(samples: int, vectors: bool, centered: bool) -> None:
    given = inputs(18, samples)
    shift, down = torch.randn(K), torch.randn(K, 16)

    def gradients(fused: bool) -> list[Tensor]:
        h, weight, bias = leaves = [t.detach().clone().requires_grad_() for t in given]
        norm = (weight, bias) if vectors else (None, None)
        if fused:
            out = ops.sparsify(h, None, shift, down, norm_stats=row_stats.row_stats(h, centered), norm_weight=norm[0], norm_bias=norm[1])
        else:
            x = (F.layer_norm if centered else F.rms_norm)(h, (K,), eps=1e-6).view(samples, -1, K)
            x = x * weight[:, None] + bias[:, None] if vectors else x
            out = ops.sparsify(x.view(-1, K), None, shift, down)
        torch.manual_seed(5)
        loss = (out.values * torch.randn_like(out.values)).sum() + (out.branch * torch.randn_like(out.branch)).sum()
        return list(torch.autograd.grad(loss, leaves if vectors else leaves[:1]))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiles_whole_with_a_dynamic_number_of_tokens() -> None:
    torch._dynamo.reset()
    weight, down, up = torch.randn(24, K), torch.randn(K, 16), torch.randn(24, 16)
    _, scale, shift = inputs(1)

    def forward(h: Tensor) -> Tensor:
        s = ops.sparsify(h, comp_down=down, norm_stats=row_stats.row_stats(h), norm_weight=scale, norm_bias=shift)
        return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, up)

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for i, m in enumerate((8, 40, 3, 129)):
        h, _, _ = inputs(m)
        torch._dynamo.mark_dynamic(h, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(h), forward(h))


def test_the_op_is_traced_with_a_dynamic_number_of_tokens() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(torch.ops.rtlynx.row_stats, backend="aot_eager", fullgraph=True)
    for i, m in enumerate((8, 40, 3)):
        h, _, _ = inputs(m)
        torch._dynamo.mark_dynamic(h, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            assert torch.equal(compiled(h, True, 1e-6), reference.row_stats(h, True, 1e-6))


def test_compiles_with_gradients() -> None:
    torch._dynamo.reset()

    def loss(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stats = row_stats.row_stats(h)
        return ops.sparsify(h, norm_stats=stats, norm_weight=weight, norm_bias=bias).values.square().sum()

    leaves = [t.detach().clone().requires_grad_() for t in inputs(12, 3)]
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inductor_selects_once_for_equal_calls_only_and_computes_the_statistics_itself() -> None:
    torch._dynamo.reset()

    def values(h: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        stats, alone = row_stats.row_stats(h), weight[0]
        kinds: list[dict[str, Any]] = [
            {"norm_stats": stats, "norm_weight": weight, "norm_bias": bias},
            {"norm_stats": stats, "norm_weight": weight, "norm_bias": bias},
            {"norm_stats": stats, "norm_weight": bias, "norm_bias": bias},
            {"norm_stats": stats, "norm_weight": weight},
            {"norm_stats": stats, "norm_weight": alone},
            {"norm_stats": stats, "norm_weight": alone},
            {},
        ]
        return [ops.sparsify(h, **kind).values for kind in kinds]

    h, weight, bias = inputs(11)
    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(values, fullgraph=True), h, weight, bias)
    assert code[0].count("rtlynx_into.sparsify_cpu(") == 5
    assert "rtlynx.sparsify.default(" not in code[0] and "rtlynx.row_stats" not in code[0]
    for a, b in zip(got, values(h, weight, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_tokens() -> None:
    h, weight, bias = inputs(0)
    stats = row_stats.row_stats(h)
    assert stats.shape == (0, 2)
    got = ops.sparsify(h, norm_stats=stats, norm_weight=weight, norm_bias=bias)
    assert [tuple(t.shape) for t in got] == [(0, 64), (1, 0, 32, 4), (0,), (0, 0)]


def test_no_tokens_have_no_gradient() -> None:
    leaves = [t.requires_grad_() for t in inputs(0, 2)]
    out = ops.sparsify(leaves[0], norm_stats=row_stats.row_stats(leaves[0]), norm_weight=leaves[1], norm_bias=leaves[2])
    for grad, leaf in zip(torch.autograd.grad(out.values.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


H, WEIGHT, BIAS = inputs(8, 2)
STATS = reference.row_stats(H)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("norm_weight", {"norm_stats": None, "norm_weight": WEIGHT}),
    ("norm_bias", {"norm_stats": None, "norm_bias": BIAS}),
    ("activation", {"activation": "gelu"}),
    ("head", {"head": H}),
    ("norm_stats", {"norm_stats": STATS[:7]}),
    ("norm_stats", {"norm_stats": STATS[:, :1]}),
    ("norm_stats", {"norm_stats": STATS.bfloat16()}),
    ("norm_stats", {"norm_stats": STATS.to("meta")}),
    ("norm_weight", {"norm_weight": WEIGHT[:, :64]}),
    ("norm_weight", {"norm_weight": WEIGHT.half()}),
    ("norm_weight", {"norm_weight": H[:3]}),
    ("norm_weight", {"norm_weight": H[:0]}),
    ("norm_weight", {"norm_weight": WEIGHT[:, None]}),
    ("norm_bias", {"norm_weight": WEIGHT, "norm_bias": BIAS[:1]}),
    ("norm_bias", {"norm_bias": BIAS.double()}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(**{"x": H, "norm_stats": STATS, **change})
    assert (caught.value.op, caught.value.argument) == ("sparsify", argument)


@pytest.mark.parametrize(
    "argument, change",
    [("h", {"h": H[0]}), ("h", {"h": H[:, :100]}), ("h", {"h": H.double()}), ("eps", {"eps": -1.0}), ("eps", {"eps": float("nan")})],
)
def test_statistics_refuse(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        row_stats.row_stats(**{"h": H, **change})
    assert (caught.value.op, caught.value.argument) == ("row_stats", argument)


def test_the_norm_counts_for_the_way_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    monkeypatch.setattr(ops, "direct", lambda *tensors: asked.extend(tensors))
    ops.sparsify(H, norm_stats=STATS, norm_weight=WEIGHT, norm_bias=BIAS)
    for tensor in (STATS, WEIGHT, BIAS):
        assert any(t is tensor for t in asked)


def test_the_gpu_says_whether_its_kernel_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "activations", lambda index: ["none", "norm"] if index else ["none"])
    assert selection_norms(torch.device("cuda", 1)) and not selection_norms(torch.device("cuda", 0))
    assert selection_norms(torch.device("cpu"))
