"""The one-kernel layer against a float64 product over the reference's selection, by ‖out - ref‖ / ‖ref‖, and as a citizen of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, reference
from rtlynx.fused import fused_linear
from shapes import MODEL_SHAPES, RANKS, TAIL_SHAPES

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
"""As for the two ops (test_sparse_linear.py): one rounding of the result, besides T's, which the reference rounds as well."""

Options = dict[str, Any]


def make_layer(m: int, n: int, k: int, rank: int, dtype: torch.dtype, with_bias: bool = True) -> tuple[Tensor, Tensor, Options]:
    """x with outlier channels and many ties, weight, and the other arguments."""
    x = torch.randn(m, k, device="cuda") * torch.exp(torch.randn(k, device="cuda") / 2)
    x = torch.where(torch.rand(m, k, device="cuda") < 0.2, x.round(), x).to(dtype)
    weight = torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5
    options: Options = {}
    if rank:
        options["comp_down"] = torch.randn(k, rank, device="cuda", dtype=dtype) / k**0.5
        options["comp_up"] = torch.randn(n, rank, device="cuda", dtype=dtype)
    if with_bias:
        options["bias"] = torch.randn(n, device="cuda", dtype=dtype)
    return x, weight, options


def exact(x: Tensor, weight: Tensor, options: Options) -> Tensor:
    """The defined result in float64."""
    options = dict(options)
    comp_up, bias = options.pop("comp_up", None), options.pop("bias", None)
    sparse = reference.sparsify(x, **options)
    out = reference.decompress(sparse.values, sparse.metadata).double() @ weight.double().T
    if sparse.row_scale.numel():
        out *= sparse.row_scale.double()[:, None]
    if comp_up is not None:
        out += sparse.branch.double() @ comp_up.double().T
    return out if bias is None else out + bias.double()


def check(m: int, n: int, k: int, rank: int, dtype: torch.dtype, with_bias: bool = True, **more: Any) -> None:
    x, weight, options = make_layer(m, n, k, rank, dtype, with_bias)
    options |= more
    out, want = fused_linear(x, weight, **options), exact(x, weight, options)
    assert out.shape == want.shape
    assert (out.double() - want).norm() / want.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", TAIL_SHAPES, ids=str)
def test_tails(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(m, n, k, 64, dtype)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", MODEL_SHAPES, ids=str)
def test_model_shapes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(m, n, k, 64, dtype)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("branch_input", ["dropped", "input"])
@pytest.mark.parametrize("norm_compensation", [True, False])
def test_branch_and_epilogue(rank: int, branch_input: str, norm_compensation: bool) -> None:
    with_bias = rank != 48
    check(200, 328, 320, rank, torch.bfloat16, with_bias, branch_input=branch_input, norm_compensation=norm_compensation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_score, with_shift", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m, n, k", [(65, 72, 576), (2000, 1160, 3072)], ids=str)
def test_score_and_shift(m: int, n: int, k: int, with_score: bool, with_shift: bool, dtype: torch.dtype) -> None:
    score = torch.rand(k, device="cuda") if with_score else None
    shift = torch.randn(k, device="cuda") if with_shift else None
    check(m, n, k, 64, dtype, score=score, shift=shift)


@pytest.mark.parametrize("m, n", [(64, 64), (300, 72), (386, 1096), (2000, 136), (2000, 1160), (5000, 3072)], ids=str)
@pytest.mark.parametrize("k", [64, 128, 192, 256, 320])
def test_every_tile_with_fewer_steps_than_stages(m: int, n: int, k: int) -> None:
    check(m, n, k, 32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_is_that_of_the_reference_to_the_bit(dtype: torch.dtype) -> None:
    """With the identity as weight the output is S(X) itself, so every order and tie of a group can be compared."""
    levels = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -3.0], device="cuda", dtype=dtype)
    groups = torch.cartesian_prod(levels, levels, levels, levels)  # 6⁴ groups
    x = torch.cat([groups, groups.flip(0), groups.roll(7, 0)])[: 60 * 64].reshape(-1, 256)
    x = torch.cat([x, torch.randn(200, 256, device="cuda", dtype=dtype)])
    got = fused_linear(x, torch.eye(256, device="cuda", dtype=dtype), norm_compensation=False)
    want = reference.sparsify(x)
    assert torch.equal(got, reference.decompress(want.values, want.metadata))


def test_a_non_finite_token_stays_in_its_row() -> None:
    x, weight, options = make_layer(100, 64, 256, 16, torch.bfloat16)
    x[17, 3], x[40, 7] = float("nan"), float("inf")
    finite = fused_linear(x, weight, **options).isfinite()
    assert not finite[[17, 40]].any()
    assert finite[[i for i in range(100) if i not in (17, 40)]].all()


def test_a_zero_row_gives_the_bias() -> None:
    x, weight, options = make_layer(100, 64, 256, 16, torch.bfloat16)
    x[17] = 0
    assert torch.equal(fused_linear(x, weight, **options)[17], options["bias"])


def test_no_tokens() -> None:
    x, weight, options = make_layer(0, 16, 128, 16, torch.float16)
    assert fused_linear(x, weight, **options).shape == (0, 16)


@pytest.mark.parametrize("layout", ["rows apart", "rows misaligned", "columns apart", "one row, far apart"])
def test_strided_input(layout: str) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    x = {
        "rows apart": wide[:, 8:200],
        "rows misaligned": wide[:, 1:193],
        "columns apart": torch.randn(192, 40, device="cuda").bfloat16().T,
        "one row, far apart": wide[:1, :192].as_strided((1, 192), (2**33, 1)),
    }[layout]
    _, weight, options = make_layer(1, 64, 192, 16, torch.bfloat16)
    assert torch.equal(fused_linear(x, weight, **options), fused_linear(x.contiguous().view(-1, 192), weight, **options))


def test_runs_are_reproducible() -> None:
    x, weight, options = make_layer(1000, 1160, 3072, 64, torch.bfloat16)
    assert torch.equal(fused_linear(x, weight, **options), fused_linear(x, weight, **options))


def test_many_launches_at_once() -> None:
    """Blocks of many launches on several streams compete for the GPU; none may wait for a block that cannot start."""
    x, weight, options = make_layer(2500, 1160, 320, 128, torch.bfloat16)
    want = fused_linear(x, weight, **options)
    streams = [torch.cuda.Stream() for _ in range(8)]
    outs = []
    torch.cuda.synchronize()
    for i in range(64):
        with torch.cuda.stream(streams[i % 8]):
            outs.append(fused_linear(x, weight, **options))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_non_default_stream() -> None:
    x, weight, options = make_layer(2000, 256, 512, 16, torch.bfloat16)
    want = fused_linear(x, weight, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work that ignored the stream would run before this input is written
        later = x * 1
        got = fused_linear(later, weight, **options)
    stream.synchronize()
    assert torch.equal(got, want)


def test_cuda_graph_replays_on_new_input() -> None:
    x, weight, options = make_layer(300, 256, 512, 64, torch.bfloat16)
    fused_linear(x, weight, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_linear(x, weight, **options)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, fused_linear(x, weight, **options))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_without_graph_breaks_or_recompiles(mode: str) -> None:
    _, weight, options = make_layer(1, 256, 512, 16, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(fused_linear, fullgraph=True, mode=mode, dynamic=True)
    for m in (300, 77, 1024):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
        with torch.compiler.set_stance("default" if m == 300 else "fail_on_recompile"):
            assert torch.equal(compiled(x, weight, **options).clone(), fused_linear(x, weight, **options))


def test_gradients_match_the_reference() -> None:
    x, weight, options = make_layer(300, 256, 512, 16, torch.bfloat16)

    def gradients(device: str) -> list[Tensor]:
        leaves = {name: t.detach().to(device).requires_grad_() for name, t in {"x": x, "weight": weight, **options}.items()}
        out = fused_linear(**leaves)
        out.backward(torch.ones_like(out))
        return [leaf.grad.double().cpu() for leaf in leaves.values() if leaf.grad is not None]

    got, want = gradients("cuda"), gradients("cpu")
    assert len(got) == len(want) == 5
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < 1e-2  # bf16 products in another order


def test_bad_input_is_refused_before_anything_runs() -> None:
    x, weight, options = make_layer(8, 16, 128, 16, torch.bfloat16)
    for argument, bad in {
        "weight": [weight.half(), weight.cpu(), weight[:, :64], weight[:9], torch.randn(128, 16, device="cuda").bfloat16().T],
        "comp_down": [options["comp_down"].half(), torch.randn(16, 128, device="cuda").bfloat16().T],
        "bias": [torch.zeros(15, device="cuda").bfloat16(), torch.zeros(32, device="cuda").bfloat16()[1:17]],
        "score": [torch.ones(128)],
    }.items():
        for value in bad:
            with pytest.raises(InvalidArgumentError) as caught:
                fused_linear(
                    x, weight if argument != "weight" else value, **(options | ({} if argument == "weight" else {argument: value}))
                )
            assert (caught.value.op, caught.value.argument) == ("fused_linear", argument)
    with pytest.raises(InvalidArgumentError, match="float32"):
        fused_linear(torch.randn(8, 128, device="cuda"), weight)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current() -> None:
    x, weight, options = make_layer(300, 256, 512, 16, torch.bfloat16)
    want = fused_linear(x, weight, **options)
    moved = {name: tensor.to("cuda:1") for name, tensor in options.items()}
    with torch.cuda.device(0):
        got = fused_linear(x.to("cuda:1"), weight.to("cuda:1"), **moved)
        assert torch.cuda.current_device() == 0
    assert got.device.index == 1
    assert torch.equal(got.to(x.device), want)
