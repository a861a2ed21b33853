"""The sparsify kernel against reference.py: values and metadata to the bit, row scale and branch within rounding.

Of an activation the last bit may be another than torch's, and with it what is kept of nearly equal channels: `assert_close_selection`.
"""

from __future__ import annotations

import pytest
import torch

from rtlynx import ops, reference
from rtlynx.reference import Activation
from shapes import MODEL_SHAPES, OPERANDS, RANKS, TAIL_SHAPES

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.bfloat16, torch.float16]
LARGE = 1 << 23
"""Elements of X from which on its test is one of a large layer."""
MK = [
    pytest.param(m, k, marks=[pytest.mark.large] if m * k >= LARGE else [])
    for m, k in sorted({(m, k) for m, _, k in TAIL_SHAPES + MODEL_SHAPES})
]


def token_like(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random activations with outlier channels and many ties, as real ones have."""
    x = torch.randn(m, k, device="cuda") * torch.exp(torch.randn(k, device="cuda"))
    x = torch.where(torch.rand(m, k, device="cuda") < 0.2, x.round(), x)
    return x.to(dtype)


def assert_same(got: ops.Sparsified, want: ops.Sparsified, dtype: torch.dtype) -> None:
    assert torch.equal(got.metadata, want.metadata)
    assert got.values.dtype == want.values.dtype
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    torch.testing.assert_close(got.row_scale, want.row_scale, rtol=1e-5, atol=0)
    assert got.branch.shape == want.branch.shape
    if got.branch.numel():
        error = (got.branch.double() - want.branch.double()).norm() / want.branch.double().norm()
        assert error < {torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", MK, ids=str)
def test_selection_is_bit_exact(m: int, k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    x = token_like(m, k, dtype)
    assert_same(ops.sparsify(x, values_dtype=values_dtype), reference.sparsify(x, values_dtype=values_dtype), dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_scale", [2.0**-12, 2.0**-4, 2.0**6])
def test_scaled_values_round_to_every_e4m3_number(values_scale: float, dtype: torch.dtype, values_dtype: torch.dtype) -> None:
    """Subnormal numbers, ties between two, and saturation."""
    x = (torch.arange(-(1 << 14), 1 << 14, device="cuda", dtype=torch.float32) / 16).to(dtype).view(-1, 64)
    want = reference.sparsify(x, values_dtype=values_dtype, values_scale=values_scale)
    assert_same(ops.sparsify(x, values_dtype=values_dtype, values_scale=values_scale), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_compensation", [True, False])
@pytest.mark.parametrize("branch_input", ["input", "dropped"])
@pytest.mark.parametrize("rank", [r for r in RANKS if r])
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, k", [(1, 64), (129, 1152), (200, 832)], ids=str)
def test_branch(
    m: int,
    k: int,
    rank: int,
    branch_input: reference.BranchInput,
    norm_compensation: bool,
    dtype: torch.dtype,
    values_dtype: torch.dtype | None,
) -> None:
    x, down = token_like(m, k, dtype), torch.randn(k, rank, device="cuda", dtype=dtype)
    args = (x, None, None, down, branch_input, norm_compensation, reference.EPS, values_dtype)
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_score, with_shift", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, k", [(65, 576), (512, 3072)], ids=str)
def test_score_and_shift(m: int, k: int, with_score: bool, with_shift: bool, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    x = token_like(m, k, dtype)
    score = torch.rand(k, device="cuda") if with_score else None
    shift = torch.randn(k, device="cuda") if with_shift else None
    down = torch.randn(k, 64, device="cuda", dtype=dtype)
    want = reference.sparsify(x, score, shift, down, values_dtype=values_dtype)
    assert_same(ops.sparsify(x, score, shift, down, values_dtype=values_dtype), want, dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_and_tie_of_a_group(dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    levels = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -3.0], device="cuda", dtype=dtype)
    groups = torch.cartesian_prod(levels, levels, levels, levels)  # 6⁴ groups
    x = torch.cat([groups, groups.flip(0)])[: 40 * 64].reshape(-1, 64)
    assert_same(ops.sparsify(x, values_dtype=values_dtype), reference.sparsify(x, values_dtype=values_dtype), dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_are_kept_and_spoil_only_their_row(dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    x = torch.randn(70, 128, device="cuda", dtype=dtype)
    x[3, 5], x[4, 6], x[5, 7] = float("nan"), float("inf"), -float("inf")
    x[6, 8:12] = torch.tensor([float("inf"), float("nan"), 1.0, -float("inf")], device="cuda", dtype=dtype)
    got, want = ops.sparsify(x, values_dtype=values_dtype), reference.sparsify(x, values_dtype=values_dtype)
    assert torch.equal(got.metadata, want.metadata)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert not got.row_scale[3:7].isfinite().any()
    assert got.row_scale[[*range(3), *range(7, 70)]].isfinite().all()


def test_zero_rows_have_scale_zero() -> None:
    x = torch.randn(20, 64, device="cuda", dtype=torch.bfloat16)
    x[7] = 0
    got = ops.sparsify(x, comp_down=torch.randn(64, 16, device="cuda", dtype=torch.bfloat16))
    assert got.row_scale[7] == 0
    assert not got.branch[7].any()


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_no_tokens(values_dtype: torch.dtype | None) -> None:
    x = torch.empty(0, 256, device="cuda", dtype=torch.bfloat16)
    got = ops.sparsify(x, comp_down=torch.randn(256, 16, device="cuda", dtype=torch.bfloat16), values_dtype=values_dtype)
    assert [tuple(t.shape) for t in got] == [(0, 128), (1, 0, 32, 4), (0,), (0, 16)]


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("layout", ["rows apart", "rows misaligned", "columns apart"])
def test_strided_input(layout: str, values_dtype: torch.dtype | None) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    x = {
        "rows apart": wide[:, 8:200],
        "rows misaligned": wide[:, 1:193],
        "columns apart": torch.randn(192, 40, device="cuda").bfloat16().T,
    }[layout]
    assert x.shape == (40, 192)
    want = reference.sparsify(x.contiguous(), values_dtype=values_dtype)
    assert_same(ops.sparsify(x, values_dtype=values_dtype), want, torch.bfloat16)


def test_runs_are_reproducible() -> None:
    x, down = token_like(1000, 3072, torch.bfloat16), torch.randn(3072, 64, device="cuda", dtype=torch.bfloat16)
    first, second = ops.sparsify(x, comp_down=down), ops.sparsify(x, comp_down=down)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- of an activation, and of two tensors side by side -----------------------------------------------------------------------------------

ACTIVATIONS: tuple[Activation, ...] = ("gelu_tanh", "gelu", "silu_gate")


def given(m: int, width: int, head: int, activation: Activation, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """x, and gate and head: halves of one tensor and columns out of another, as models hand them over."""
    x, gate = torch.cat([token_like(m, width, dtype), torch.randn(m, width, device="cuda", dtype=dtype)], 1).chunk(2, 1)
    before = token_like(m, head + 128, dtype)[:, 64 : 64 + head] if head else None
    return x, [gate if activation == "silu_gate" else None, before]


def assert_close_selection(
    got: ops.Sparsified,
    x: torch.Tensor,
    score: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    branch_input: str = "dropped",
    values_scale: float = 1.0,
) -> None:
    """``got`` is what sparsify makes of ``x``, were each element of x allowed to be 2 of its last bits away.

    What was kept is taken as it is, and held against x: in no group may a dropped channel exceed a kept one by more than that. Values, row
    scale and branch are those of the channels that were kept.
    """
    m, k = x.shape
    dtype, eps = x.dtype, torch.finfo(x.dtype).eps
    moved = reference.shifted(x, shift).double()
    # A shift may cancel what is left of x, but not its error. The constant is torch's own error where GELU is nearly 0.
    slack = 2 * eps * (x.double().abs() + moved.abs()) + 1e-6

    positions = reference.unpack_metadata(got.metadata, m, k, got.values.dtype)
    assert (positions[..., 0] < positions[..., 1]).all()
    assert torch.equal(got.metadata, reference.pack_metadata(positions, got.values.dtype))  # what pads it, too
    columns = reference.kept_columns(got.metadata, m, k, got.values.dtype)
    kept = torch.zeros(m, k, dtype=torch.bool, device=x.device).scatter_(1, columns, True)
    size, error = moved.abs(), slack
    if score is not None:
        size, error = size * score, error * score
    least = (size + error).masked_fill(~kept, torch.inf).unflatten(1, (-1, 4)).amin(-1)
    most = (size - error).masked_fill(kept, -torch.inf).unflatten(1, (-1, 4)).amax(-1)
    assert (least >= most).all()

    values, allowed = moved.gather(1, columns), slack.gather(1, columns)
    if got.values.dtype is reference.E4M3:
        values, allowed = (values * values_scale).clamp(-448, 448), allowed * values_scale
        allowed = allowed + values.abs() / 16 + 2.0**-10  # half a step of e4m3, normal or not
    assert got.values.isfinite().all() if got.values.dtype is dtype else not got.values.float().isnan().any()
    assert ((got.values.double() - values).abs() <= allowed).all()

    if got.row_scale.numel():
        want = (moved.square().sum(1) / (moved.gather(1, columns).square().sum(1) + reference.EPS)).sqrt()
        torch.testing.assert_close(got.row_scale.double(), want, rtol=2 * eps, atol=0)
    if down is not None:
        z = moved.masked_fill(kept, 0) if branch_input == "dropped" else moved
        want = z @ down.double()
        assert got.branch.shape == want.shape and got.branch.dtype == dtype
        assert (got.branch.double() - want).norm() < {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype] * want.norm()


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("head", [0, 64, 3072])
@pytest.mark.parametrize("m, width", [(1, 64), (129, 1152), (77, 12288)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(
    activation: Activation, m: int, width: int, head: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    x, what = given(m, width, head, activation, dtype)
    down = torch.randn(head + width, rank, device="cuda", dtype=dtype) if rank else None
    got = ops.sparsify(x, None, None, down, "dropped", True, reference.EPS, values_dtype, 1.0, activation, *what)
    assert_close_selection(got, reference.activated(x, activation, *what), down=down)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branch_input", ["input", "dropped"])
@pytest.mark.parametrize("with_score, with_shift", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_with_score_and_shift(
    activation: Activation,
    with_score: bool,
    with_shift: bool,
    branch_input: reference.BranchInput,
    dtype: torch.dtype,
    values_dtype: torch.dtype | None,
) -> None:
    x, what = given(200, 832, 64, activation, dtype)
    score = torch.rand(896, device="cuda") if with_score else None
    shift = torch.randn(896, device="cuda") if with_shift else None
    down, scale = torch.randn(896, 48, device="cuda", dtype=dtype), 0.5 if values_dtype else 1.0
    got = ops.sparsify(x, score, shift, down, branch_input, True, reference.EPS, values_dtype, scale, activation, *what)
    assert_close_selection(got, reference.activated(x, activation, *what), score, shift, down, branch_input, scale)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("m, width, head", [(1, 64, 64), (129, 1152, 64), (200, 576, 3072), (63, 3072, 832)], ids=str)
def test_a_head_without_an_activation_is_bit_exact(
    m: int, width: int, head: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    x, what = given(m, width, head, "none", dtype)
    down = torch.randn(head + width, rank, device="cuda", dtype=dtype) if rank else None
    args = x, None, None, down, "dropped", True, reference.EPS, values_dtype, 1.0, "none", *what
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("which", ["x", "gate", "head"])
@pytest.mark.parametrize("layout", ["rows misaligned", "columns apart"])
def test_activation_of_strided_input(layout: str, which: str, values_dtype: torch.dtype | None) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    odd = wide[:, 1:193] if layout == "rows misaligned" else torch.randn(192, 40, device="cuda").bfloat16().T
    tensors = {name: torch.randn(40, 192, device="cuda", dtype=torch.bfloat16) for name in ("x", "gate", "head")} | {which: odd}
    got = ops.sparsify(**tensors, values_dtype=values_dtype, activation="silu_gate")
    assert_close_selection(got, reference.activated(**tensors, activation="silu_gate"))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_before_an_activation_spoil_only_their_row(activation: Activation, values_dtype: torch.dtype | None) -> None:
    value, gate = (torch.randn(70, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    head = torch.randn(70, 64, device="cuda", dtype=torch.bfloat16)
    value[3, 5], value[4, 6], head[5, 7] = float("nan"), float("inf"), float("nan")
    gate = gate if activation == "silu_gate" else None
    got = ops.sparsify(value, values_dtype=values_dtype, activation=activation, gate=gate, head=head)
    assert not got.row_scale[3:6].isfinite().any()
    fine = [*range(3), *range(6, 70)]
    assert got.row_scale[fine].isfinite().all()
    assert not got.values[fine].float().isnan().any()
    assert got.values[3].float().isnan().sum() == got.values[5].float().isnan().sum() == 1


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_no_tokens_to_activate(values_dtype: torch.dtype | None) -> None:
    x, what = given(0, 256, 64, "silu_gate", torch.bfloat16)
    got = ops.sparsify(x, None, None, None, "dropped", True, reference.EPS, values_dtype, 1.0, "silu_gate", *what)
    assert [tuple(t.shape) for t in got] == [(0, 160), (2, 0, 32, 4), (0,), (0, 0)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_runs_with_an_activation_are_reproducible(activation: Activation) -> None:
    x, what = given(1000, 3072, 64, activation, torch.bfloat16)
    down = torch.randn(3136, 64, device="cuda", dtype=torch.bfloat16)
    args = x, None, None, down, "dropped", True, reference.EPS, None, 1.0, activation, *what
    assert all(torch.equal(a, b) for a, b in zip(ops.sparsify(*args), ops.sparsify(*args), strict=True))
