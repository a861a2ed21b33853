"""`rtlynx.norm_rotary`: against torch's norm and a complex product, shapes, tracing, refusals, and what a launch is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rtlynx import InvalidArgumentError, _core, launch, norm_rotary
from rtlynx.norm_rotary import MAX_HEAD_DIM
from rtlynx.norm_rotary import norm_rotary as op

F32 = torch.float32
DTYPES = [F32, torch.bfloat16, torch.float16]


def angles(tokens: int, dim: int) -> Tensor:
    """``(S, D / 2)`` complex64."""
    turned = 100 * torch.randn(tokens, dim // 2)
    return torch.complex(turned.cos(), turned.sin())


def given(
    samples: int = 2, tokens: int = 5, first_tokens: int = 3, heads: int = 3, dim: int = 32, dtype: torch.dtype = F32
) -> dict[str, Any]:
    torch.manual_seed(tokens)
    freqs = angles(first_tokens + tokens, dim)
    return {
        "x": torch.randn(samples, tokens, heads, dim).to(dtype),
        "cos": freqs.real,
        "sin": freqs.imag,
        "weight": (1 + torch.randn(dim) / 2).to(dtype),
        "eps": 1e-5,
        "first": torch.randn(samples, first_tokens, heads, dim).to(dtype),
        "first_weight": (1 + torch.randn(dim) / 2).to(dtype),
        "first_eps": 1e-3,
    }


def by_torch(x: Tensor, cos: Tensor, sin: Tensor, weight: Any, eps: float, first: Any, first_weight: Any, first_eps: float) -> Tensor:
    parts = []
    for part, vector, added in ((first, first_weight, first_eps), (x, weight, eps)):
        if part is not None:
            parts.append(part if vector is None else F.rms_norm(part, part.shape[-1:], vector, added))
    wide = torch.view_as_complex(torch.cat(parts, 1).float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(wide * torch.complex(cos, sin)[:, None]).flatten(3).to(x.dtype)


@pytest.mark.parametrize("without", [(), ("weight",), ("first_weight",), ("first", "first_weight"), ("weight", "first", "first_weight")])
@pytest.mark.parametrize("dim", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_torchs_norm_and_a_complex_product(dtype: torch.dtype, dim: int, without: tuple[str, ...]) -> None:
    what = given(dim=dim, dtype=dtype, first_tokens=0 if "first" in without else 3) | dict.fromkeys(without)
    got, want = op(**what), by_torch(**what)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    # What the norm rounds the other way after a last bit of its mean comes out that much further off.
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 if dtype == F32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [(1, 1), (0, 3), (3, 0), (0, 0), (37, 19)], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_any_number_of_tokens(samples: int, lengths: tuple[int, int]) -> None:
    what = given(samples, *lengths)
    got = op(**what)
    assert got.shape == (samples, sum(lengths), 3, 32)
    torch.testing.assert_close(got, by_torch(**what), rtol=1e-5, atol=1e-5)


def test_strided_heads_and_angles_given_twice() -> None:
    what = given(first_tokens=0)
    _, x, _ = torch.randn(2, 5, 3 * 96).chunk(3, -1)  # as fused projections give it
    twice = what["cos"].repeat_interleave(2, 1), what["sin"].repeat_interleave(2, 1)
    what |= {"x": x.unflatten(-1, (3, 32)), "cos": twice[0][:, ::2], "sin": twice[1][:, ::2]}
    torch.testing.assert_close(op(**what), by_torch(**what), rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    for dtype in (F32, torch.bfloat16):
        for without in ((), ("weight",), ("first", "first_weight")):
            what = given(dtype=dtype, first_tokens=0 if "first" in without else 3) | dict.fromkeys(without)
            torch.library.opcheck(torch.ops.rtlynx.norm_rotary.default, tuple(what.values()))


def test_compiles_whole_with_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda **what: op(**what), fullgraph=True, backend="aot_eager")
    for i, (samples, tokens, first_tokens) in enumerate(((2, 8, 3), (2, 40, 7), (2, 5, 70), (3, 6, 2), (4, 9, 11))):
        what = given(samples, tokens, first_tokens)
        what["cos"], what["sin"] = what["cos"].contiguous(), what["sin"].contiguous()
        with torch.no_grad(), torch.compiler.set_stance("default" if i in (0, 1, 3) else "fail_on_recompile"):
            torch.testing.assert_close(compiled(**what), op(**what))


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------

OK = given()
BAD: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": OK["x"][0]}),
    ("x", {"x": OK["x"].double()}),
    ("x", {"x": OK["x"][..., :20]}),
    ("x", {"x": OK["x"][..., :0]}),
    ("x", {"x": torch.zeros(2, 5, 1, 264)}),
    ("first", {"first": OK["first"][:1]}),
    ("first", {"first": OK["first"][:, :, :1]}),
    ("first", {"first": OK["first"].half()}),
    ("first_weight", {"first": None}),
    ("first_weight", {"first_weight": OK["weight"].half()}),
    ("weight", {"weight": OK["weight"][:8]}),
    ("weight", {"weight": OK["weight"].to("meta")}),
    ("cos", {"cos": OK["cos"][1:]}),
    ("cos", {"cos": OK["cos"].repeat_interleave(2, 1)}),
    ("cos", {"cos": OK["cos"].double()}),
    ("sin", {"sin": OK["sin"][None]}),
    ("eps", {"eps": -1.0}),
    ("eps", {"first_eps": float("nan")}),
]


@pytest.mark.parametrize("argument, change", BAD)
def test_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        op(**{**OK, **change})
    assert (caught.value.op, caught.value.argument) == ("norm_rotary", argument)


@pytest.mark.parametrize("what", ["x", "weight", "first"])
def test_gradients_are_refused(what: str) -> None:
    wanted = {**OK, what: OK[what].clone().requires_grad_()}
    with pytest.raises(InvalidArgumentError, match="gradients"):
        op(**wanted)
    with torch.no_grad():
        op(**wanted)
    with pytest.raises(InvalidArgumentError, match="gradients"):  # past the function, no later than where they would be lost
        torch.ops.rtlynx.norm_rotary(*wanted.values()).sum().backward()


def test_a_cpu_is_left_to_torch() -> None:
    assert not norm_rotary.available(torch.device("cpu")) and _core.MAX_HEAD_DIM == MAX_HEAD_DIM


# ---- the launch --------------------------------------------------------------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, **change: Any) -> tuple[Any, ...] | None:
    """What the extension is given."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "core", lambda: type("Core", (), {"norm_rotary": staticmethod(lambda *given: calls.append(given))}))
    monkeypatch.setattr(launch, "stream", lambda _index: 7)
    what = given(dtype=torch.float16) | change
    shape = what["x"].shape
    tokens = shape[1] + (0 if what["first"] is None else what["first"].shape[1])
    launch.norm_rotary(*what.values(), torch.empty(shape[0], tokens, *shape[2:], dtype=torch.float16))
    return calls[0] if calls else None


def test_tensors_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch.zeros(2, 5, 3 * 96).half()
    x, first = fused[..., 96:192].unflatten(-1, (3, 32)), given(dtype=torch.float16)["first"]
    what = given(dtype=torch.float16)
    call = launched(monkeypatch, x=x, first=first, cos=what["cos"], sin=what["sin"])
    assert call is not None and call[:8] == (-1, 7, "float16", 2, 5, 3, 3, 32)
    assert call[8:11] == ((5 * 288, 288, 32), (288, 96, 32), (32, 2))
    assert call[11:13] == (x.data_ptr(), first.data_ptr()) and call[15:17] == (what["cos"].data_ptr(), what["cos"].data_ptr() + 4)
    assert call[18:] == (1e-5, 1e-3)


@pytest.mark.parametrize("kind", ["channels apart", "misaligned", "odd tokens"])
def test_what_cannot_be_read_in_place_is_copied(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.zeros(2, 5, 3, 64 + 4).half()
    x = {"channels apart": whole[..., :64:2], "misaligned": whole[..., 4:36], "odd tokens": whole[..., :32]}[kind]
    call = launched(monkeypatch, x=x, weight=torch.zeros(33).half()[1:])
    assert call is not None and call[8] == (480, 96, 32) and call[11] != x.data_ptr() and call[13] % 16 == 0


def test_there_may_be_no_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (None, torch.zeros(2, 0, 3, 32).half()):
        call = launched(monkeypatch, first=first, first_weight=None, weight=None)
        assert call is not None and (call[5], call[9], call[12:15]) == (0, (0, 0, 0), (0, 0, 0))
    assert launched(monkeypatch, x=torch.zeros(2, 0, 3, 32).half(), first=None) is None
    one = launched(monkeypatch, x=torch.zeros(1, 1, 1, 33).half()[..., :32], first=None)
    assert one is not None and one[8] == (0, 0, 0)  # of one there is no stride


# ---- by inductor -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_compiled_code_writes_into_memory_of_inductor(dynamic: bool) -> None:
    torch._dynamo.reset()
    what = given(dtype=torch.bfloat16)
    fused, cos, sin = torch.randn(2, 5, 3 * 96).bfloat16(), torch.randn(8, 32), torch.randn(8, 32)

    def forward(fused: Tensor, cos: Tensor, sin: Tensor, first: Tensor) -> Tensor:
        x = fused.chunk(3, -1)[1].unflatten(-1, (3, 32))
        out = op(x, cos[:, ::2], sin[:, ::2], what["weight"], 1e-5, first + 1, what["first_weight"], 1e-3)
        return out + op(2 * x, cos[3:, ::2], sin[3:, ::2])[:, :1]

    with torch._inductor.config.patch(fx_graph_cache=False):
        got, (code,) = run_and_get_code(torch.compile(forward, fullgraph=True, dynamic=dynamic), fused, cos, sin, what["first"])
    assert code.count("rtlynx_into.norm_rotary_cpu(") == 2 and "rtlynx.norm_rotary.default(" not in code
    torch.testing.assert_close(got, forward(fused, cos, sin, what["first"]), rtol=2e-2, atol=2e-2)
