"""The sparsify kernel against reference.py: values and metadata to the bit, row scale and branch within rounding."""

from __future__ import annotations

import pytest
import torch
from shapes import MODEL_SHAPES, OPERANDS, RANKS, TAIL_SHAPES

from rtlynx import ops, reference

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.bfloat16, torch.float16]
MK = sorted({(m, k) for m, _, k in TAIL_SHAPES + MODEL_SHAPES})


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
