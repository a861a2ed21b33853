"""Row statistics, and a norm inside the selection: the same bits as the reference's norm and selection of the same statistics."""

from __future__ import annotations

import pytest
import torch
from test_sparsify import DTYPES, MK, assert_same, token_like
from torch import Tensor

from rtlynx import ops, reference
from rtlynx.row_stats import row_stats
from shapes import OPERANDS

pytestmark = pytest.mark.usefixtures("kernels")


def modulation(samples: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias as models have them: around 1 and around 0."""
    return tuple((torch.randn(samples, k, device="cuda") / 2 + mean).to(dtype) for mean in (1, 0))  # type: ignore[return-value]


# ---- statistics -------------------------------------------------------------------------------------------------------------------------


def assert_stats(got: Tensor, h: Tensor, centered: bool, eps: float = 1e-6) -> None:
    wide = h.double()
    mean = wide.mean(1) if centered else torch.zeros_like(wide[:, 0])
    rstd = ((wide - mean[:, None]).square().mean(1) + eps).rsqrt()
    assert got.dtype == torch.float32 and got.shape == (len(h), 2)
    # Sums of K float32 numbers: some hundred of their last bits at most. What a mean near 0 is a sum of has this size.
    torch.testing.assert_close(got[:, 1].double(), rstd, rtol=1e-5, atol=0)
    assert ((got[:, 0].double() - mean).abs() <= 1e-5 * wide.abs().mean(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("m, k", MK, ids=str)
def test_statistics(m: int, k: int, centered: bool, dtype: torch.dtype) -> None:
    h = token_like(m, k, dtype)
    assert_stats(row_stats(h, centered), h, centered)


@pytest.mark.parametrize("dtype, mean", [(torch.bfloat16, 256.0), (torch.float16, 512.0)], ids=str)
def test_statistics_of_rows_far_from_zero(dtype: torch.dtype, mean: float) -> None:
    """Whose mean of squares less the squared mean would have few digits left."""
    h = (mean + torch.randn(70, 3072, device="cuda")).to(dtype)
    assert_stats(row_stats(h), h, True)


@pytest.mark.parametrize("centered", [True, False])
def test_statistics_of_constant_and_of_zero_rows(centered: bool) -> None:
    h = torch.zeros(9, 192, device="cuda", dtype=torch.bfloat16)
    h[3] = 5
    assert_stats(row_stats(h, centered, 0.25), h, centered, 0.25)


@pytest.mark.parametrize("layout", ["rows apart", "rows misaligned", "columns apart"])
def test_statistics_of_strided_input(layout: str) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    h = {
        "rows apart": wide[:, 8:200],
        "rows misaligned": wide[:, 1:193],
        "columns apart": torch.randn(192, 40, device="cuda").bfloat16().T,
    }[layout]
    assert_stats(row_stats(h), h, True)


@pytest.mark.parametrize("centered", [True, False])
def test_non_finite_values_spoil_only_their_rows_statistics(centered: bool) -> None:
    h = torch.randn(11, 320, device="cuda", dtype=torch.bfloat16)
    h[3, 5], h[4, 300] = float("nan"), float("inf")
    got, fine = row_stats(h, centered), [*range(3), *range(5, 11)]
    assert got[3, 1].isnan()
    assert got[4, 1].isnan() if centered else got[4, 1] == 0
    assert_stats(got[fine], h[fine], centered)


def test_no_rows_have_no_statistics() -> None:
    assert row_stats(torch.empty(0, 256, device="cuda", dtype=torch.float16)).shape == (0, 2)


# ---- selection --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", MK, ids=str)
def test_selection_is_bit_exact(m: int, k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    h, norm = token_like(m, k, dtype), modulation(1, k, dtype)
    args = h, None, None, None, "dropped", True, reference.EPS, values_dtype, 1.0, "none", None, None, row_stats(h), *norm
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branch_input", ["input", "dropped"])
@pytest.mark.parametrize("rank", [16, 32, 48, 128])
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, k", [(1, 64), (129, 1152), (200, 832)], ids=str)
def test_branch(
    m: int, k: int, rank: int, branch_input: reference.BranchInput, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    h, norm = token_like(m, k, dtype), modulation(1, k, dtype)
    down = torch.randn(k, rank, device="cuda", dtype=dtype)
    args = h, None, None, down, branch_input, True, reference.EPS, values_dtype, 1.0, "none", None, None, row_stats(h), *norm
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("m, samples", [(130, 2), (129, 3), (75, 5), (66, 33), (67, 67)])
def test_every_sample_has_its_own_modulation(m: int, samples: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    """Samples that begin and end inside of tiles, and between a lane's two rows."""
    h, (weight, bias) = token_like(m, 576, dtype), modulation(samples, 2 * 576, dtype)
    norm = row_stats(h), weight[:, :576], bias[:, 576:]  # not contiguous
    down = torch.randn(576, rank, device="cuda", dtype=dtype) if rank else None
    args = h, None, None, down, "dropped", True, reference.EPS, values_dtype, 1.0, "none", None, None, *norm
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("with_weight, with_bias", [(False, False), (True, False), (False, True)])
def test_weight_and_bias_may_be_absent(
    with_weight: bool, with_bias: bool, centered: bool, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    h, (weight, bias) = token_like(70, 320, dtype), modulation(1, 320, dtype)
    h[:, ::7] = -0.0  # whose sign stays without a mean and a bias
    norm = row_stats(h, centered), weight if with_weight else None, bias if with_bias else None
    args = h, None, None, None, "dropped", True, reference.EPS, values_dtype, 1.0, "none", None, None, *norm
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_score, with_shift", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, k", [(65, 576), (512, 3072)], ids=str)
def test_score_and_shift(m: int, k: int, with_score: bool, with_shift: bool, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    h, norm = token_like(m, k, dtype), modulation(1, k, dtype)
    score = torch.rand(k, device="cuda") if with_score else None
    shift = torch.randn(k, device="cuda") if with_shift else None
    down, scale = torch.randn(k, 64, device="cuda", dtype=dtype), 4.0 if values_dtype else 1.0
    args = h, score, shift, down, "dropped", True, reference.EPS, values_dtype, scale, "none", None, None, row_stats(h), *norm
    assert_same(ops.sparsify(*args), reference.sparsify(*args), dtype)


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("layout", ["rows apart", "rows misaligned", "columns apart"])
def test_strided_input(layout: str, values_dtype: torch.dtype | None) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    h = {
        "rows apart": wide[:, 8:200],
        "rows misaligned": wide[:, 1:193],
        "columns apart": torch.randn(192, 40, device="cuda").bfloat16().T,
    }[layout]
    weight, bias = modulation(2, 192, torch.bfloat16)
    options = {"values_dtype": values_dtype, "norm_stats": row_stats(h), "norm_weight": weight, "norm_bias": bias}
    assert_same(ops.sparsify(h, **options), reference.sparsify(h.contiguous(), **options), torch.bfloat16)


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_non_finite_values_spoil_only_their_row(values_dtype: torch.dtype | None) -> None:
    h, (weight, bias) = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16), modulation(1, 128, torch.bfloat16)
    h[3, 5], h[4, 6] = float("nan"), float("inf")
    got = ops.sparsify(h, values_dtype=values_dtype, norm_stats=row_stats(h), norm_weight=weight, norm_bias=bias)
    assert not got.row_scale[3:5].isfinite().any()
    fine = [*range(3), *range(5, 70)]
    assert got.row_scale[fine].isfinite().all() and not got.values[fine].float().isnan().any()


def test_no_tokens() -> None:
    h, (weight, bias) = torch.empty(0, 256, device="cuda", dtype=torch.bfloat16), modulation(1, 256, torch.bfloat16)
    got = ops.sparsify(h, norm_stats=row_stats(h), norm_weight=weight, norm_bias=bias)
    assert [tuple(t.shape) for t in got] == [(0, 128), (1, 0, 32, 4), (0,), (0, 0)]


# ---- both -------------------------------------------------------------------------------------------------------------------------------


def select(h: Tensor, weight: Tensor, bias: Tensor, down: Tensor) -> ops.Sparsified:
    return ops.sparsify(h, comp_down=down, norm_stats=row_stats(h), norm_weight=weight, norm_bias=bias)


@torch.no_grad()
def test_runs_are_reproducible_on_any_stream_and_in_a_graph() -> None:
    h, norm = token_like(1000, 3072, torch.bfloat16), modulation(4, 3072, torch.bfloat16)
    down = torch.randn(3072, 64, device="cuda", dtype=torch.bfloat16)
    want = select(h, *norm, down)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = select(h, *norm, down)
    torch.cuda.current_stream().wait_stream(side)
    graph, read = torch.cuda.CUDAGraph(), torch.zeros_like(h)
    with torch.cuda.graph(graph):
        captured = select(read, *norm, down)
    read.copy_(h)
    graph.replay()
    for other in (on_side, captured):
        assert all(torch.equal(a, b) for a, b in zip(other, want, strict=True))
