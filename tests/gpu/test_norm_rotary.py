"""Queries and keys normed, concatenated and rotated by one kernel: what the reference gives, and torch's norm and a complex product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, norm_rotary, reference_rotary
from rtlynx.fusions import rotary
from rtlynx.norm_rotary import norm_rotary as op

DTYPES = [torch.bfloat16, torch.float16]


def angles(tokens: int, dim: int) -> Tensor:
    """``(S, D / 2)`` complex64."""
    turned = 100 * torch.randn(tokens, dim // 2, device="cuda")
    return torch.polar(torch.ones_like(turned), turned)


def weight_of(dim: int, dtype: torch.dtype) -> Tensor:
    return (1 + torch.randn(dim, device="cuda") / 2).to(dtype)


def heads_of(samples: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Of different sizes, as real ones are."""
    size = torch.exp(torch.randn(samples, tokens, heads, 1, device="cuda"))
    return (size * torch.randn(samples, tokens, heads, dim, device="cuda")).to(dtype)


def given(samples: int, tokens: int, first_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    freqs = angles(first_tokens + tokens, dim)
    what = {
        "x": heads_of(samples, tokens, heads, dim, dtype),
        "cos": freqs.real,
        "sin": freqs.imag,
        "weight": weight_of(dim, dtype),
        "eps": 1e-5,
    }
    if first_tokens:
        what |= {"first": heads_of(samples, first_tokens, heads, dim, dtype), "first_weight": weight_of(dim, dtype), "first_eps": 1e-2}
    return what


def assert_same(got: Tensor, want: Tensor) -> None:
    """The last bit of a mean, and a product that is not rounded before a sum, may turn a rounding of the norm and one at the end."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous() and not got.isnan().any()
    pairs = want.double().unflatten(-1, (-1, 2))
    size = pairs.norm(dim=-1, keepdim=True).expand_as(pairs).flatten(-2)  # that of what was rounded before it was rotated
    assert ((got.double() - want.double()).abs() <= 3 * torch.finfo(want.dtype).eps * size + 1e-6).all()
    if want.numel() > 10000:
        assert (got != want).double().mean() < 0.02


@pytest.mark.parametrize("lengths", [(1, 0), (1, 1), (37, 19), (64, 0), (513, 77), (4096, 512)], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_tokens(dtype: torch.dtype, samples: int, lengths: tuple[int, int]) -> None:
    what = given(samples, *lengths, 24, 128, dtype)
    assert_same(op(**what), reference_rotary.norm_rotary(**what))


@pytest.mark.parametrize("heads", [1, 3, 4, 8, 9, 24])
@pytest.mark.parametrize("dim", [8, 32, 56, 64, 72, 96, 128, 136, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_heads(dtype: torch.dtype, dim: int, heads: int) -> None:
    what = given(2, 45, 13, heads, dim, dtype)
    assert_same(op(**what), reference_rotary.norm_rotary(**what))


@pytest.mark.parametrize("without", [("weight",), ("first_weight",), ("weight", "first_weight")])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_without_a_norm(dtype: torch.dtype, dim: int, without: tuple[str, ...]) -> None:
    what = given(2, 45, 13, 3, dim, dtype) | dict.fromkeys(without)
    assert_same(op(**what), reference_rotary.norm_rotary(**what))


@pytest.mark.parametrize("without_first", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_torchs_norm_and_the_rotation_in_passes(dtype: torch.dtype, dim: int, without_first: bool) -> None:
    what = given(2, 300, 0 if without_first else 77, 6, dim, dtype)
    parts = [F.rms_norm(what["x"], (dim,), what["weight"], what["eps"])]
    if not without_first:
        parts.insert(0, F.rms_norm(what["first"], (dim,), what["first_weight"], what["first_eps"]))
    assert_same(op(**what), rotary.rotated(parts, torch.complex(what["cos"], what["sin"])[:, None]))


@pytest.mark.parametrize("layout", ["a fused projection", "heads apart", "channels apart", "misaligned", "odd tokens", "repeated"])
def test_strided_heads(layout: str) -> None:
    wide = heads_of(2, 45, 9, 128, torch.bfloat16)
    x = {
        "a fused projection": wide[:, :, 3:6],
        "heads apart": wide.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 3:6],
        "channels apart": wide[:, :, :3].transpose(2, 3).contiguous().transpose(2, 3),
        "misaligned": wide.flatten(2)[:, :, 5 : 5 + 384].unflatten(-1, (3, 128)),
        "odd tokens": torch.cat([wide.flatten(2), wide.flatten(2)[:, :, :3]], -1)[:, :, :384].unflatten(-1, (3, 128)),
        "repeated": wide[:, :1, :1].expand(2, 45, 3, 128),
    }[layout]
    what = given(2, 45, 13, 3, 128, torch.bfloat16) | {"x": x}
    assert_same(op(**what), reference_rotary.norm_rotary(**what))
    swapped = what | {"x": what["first"], "first": x, "cos": what["cos"], "sin": what["sin"]}
    assert_same(op(**swapped), reference_rotary.norm_rotary(**swapped))


@pytest.mark.parametrize("layout", ["complex", "twice", "contiguous", "of different strides", "columns apart"])
def test_strided_angles(layout: str) -> None:
    what = given(2, 45, 13, 3, 64, torch.float16)
    cos, sin = what["cos"].contiguous(), what["sin"].contiguous()
    twice = [each.repeat_interleave(2, 1)[:, ::2] for each in (cos, sin)]
    what["cos"], what["sin"] = {
        "complex": (what["cos"], what["sin"]),
        "twice": tuple(twice),
        "contiguous": (cos, sin),
        "of different strides": (cos, twice[1]),
        "columns apart": (cos.T.contiguous().T, sin.T.contiguous().T),
    }[layout]
    assert_same(op(**what), reference_rotary.norm_rotary(**what))


def test_a_misaligned_weight() -> None:
    what = given(1, 45, 13, 3, 64, torch.bfloat16)
    what["weight"] = torch.cat([what["weight"][:1], what["weight"]])[1:]
    assert_same(op(**what), reference_rotary.norm_rotary(**what))


def test_no_tokens() -> None:
    what = given(2, 4, 3, 3, 64, torch.bfloat16)
    nothing = what["x"][:, :0]
    assert_same(op(**what | {"x": nothing, "cos": what["cos"][:3], "sin": what["sin"][:3]}), op(*first_alone(what)))
    last = {"cos": what["cos"][3:], "sin": what["sin"][3:]}
    assert_same(op(**what | last | {"first": nothing}), op(what["x"], *last.values(), what["weight"], what["eps"]))
    assert op(nothing, what["cos"][:0], what["sin"][:0]).shape == (2, 0, 3, 64)


def first_alone(what: dict[str, Any]) -> tuple[Any, ...]:
    return what["first"], what["cos"][:3], what["sin"][:3], what["first_weight"], what["first_eps"]


def test_zero_heads_stay_zero_and_non_finite_ones_spoil_only_themselves() -> None:
    what = given(1, 45, 13, 5, 128, torch.bfloat16)
    x = what["x"]
    x[0, 7, 1] = 0
    x[0, 7, 2, 5], x[0, 8, 0, 127] = float("nan"), float("inf")
    got = op(**what)
    assert not got[0, 13 + 7, 1].any() and got[0, 13 + 7, 2].isnan().all() and not got[0, 13 + 8, 0, 126:].isfinite().any()
    x[0, 7, 2] = x[0, 8, 0] = 1
    fine = torch.ones_like(got, dtype=torch.bool)
    fine[0, 13 + 7, 2] = fine[0, 13 + 8, 0] = False
    assert torch.equal(got[fine], op(**what)[fine])


def test_addresses_beyond_32_bits() -> None:
    tokens, dim = 240_000, 128
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    fused = torch.empty(1, tokens, 3 * 24 * dim, device="cuda", dtype=torch.bfloat16)  # 4.4 GB
    fused[:, -64:] = torch.randn(1, 64, 3 * 24 * dim, device="cuda")
    freqs, weight = angles(tokens, dim), weight_of(dim, torch.bfloat16)
    q = fused[..., : 24 * dim].unflatten(-1, (24, dim))
    got = op(q, freqs.real, freqs.imag, weight)[:, -64:]
    assert_same(got.contiguous(), reference_rotary.norm_rotary(q[:, -64:], freqs.real[-64:], freqs.imag[-64:], weight))
    del fused, q, got
    # and of the output: 800 000 tokens of 24 heads
    one = heads_of(1, 1, 24, dim, torch.bfloat16)
    freqs = angles(1, dim).expand(800_000, dim // 2)
    out = op(one.expand(1, 800_000, 24, dim), freqs.real, freqs.imag, weight)
    assert (out[:, -1] == out[:, 0]).all() and (out[:, 700_001] == out[:, 0]).all()


def test_another_stream_and_a_graph() -> None:
    what = given(2, 45, 13, 3, 128, torch.bfloat16)
    want = op(**what)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        on_stream = op(**what)
    stream.synchronize()
    assert torch.equal(on_stream, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = op(**what)
    what["x"].copy_(torch.randn_like(what["x"]))
    graph.replay()
    assert torch.equal(captured, op(**what))


def test_past_the_dispatcher_and_through_it_it_is_the_same() -> None:
    what = given(2, 45, 13, 3, 128, torch.bfloat16)
    through = torch.ops.rtlynx.norm_rotary(*what.values())
    with torch.no_grad():
        assert torch.equal(op(**what), through)
    with torch.inference_mode():
        assert torch.equal(op(**what), through)
    torch.library.opcheck(torch.ops.rtlynx.norm_rotary.default, tuple(what.values()))


@torch.no_grad()
def test_compiled_code_launches_it() -> None:
    torch._dynamo.reset()
    cos, sin = (each.repeat_interleave(2, 1) for each in (angles(58, 128).real, angles(58, 128).imag))
    what = given(2, 45, 13, 3, 128, torch.bfloat16)

    def forward(x: Tensor, first: Tensor) -> Tensor:
        return op(x, cos[:, ::2], sin[:, ::2], what["weight"], 1e-6, first, what["first_weight"], 1e-6)

    with torch._inductor.config.patch(fx_graph_cache=False):
        got, code = run_and_get_code(torch.compile(forward, fullgraph=True), what["x"], what["first"])
    assert code[0].count("rtlynx_into.norm_rotary_cuda(") == 1
    assert torch.equal(got, forward(what["x"], what["first"]))


def test_float32_is_refused() -> None:
    what = given(1, 5, 0, 3, 64, torch.bfloat16)
    assert norm_rotary.available(what["x"].device)
    with pytest.raises(InvalidArgumentError, match="float32"):
        op(what["x"].float(), what["cos"], what["sin"])
