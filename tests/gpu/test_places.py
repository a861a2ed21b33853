"""Selection from gathered channels against gathering them before: to the bit, of X as it is and of an activation, on every kernel."""

from __future__ import annotations

import pytest
import torch

from permutations import in_windows
from rtlynx import SparseLinear, ops, reference
from rtlynx.reference import Activation
from shapes import OPERANDS

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.bfloat16, torch.float16]
KS = [64, 192, 256, 1152, 3072]
MS = [1, 129]


def random(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Uneven channels and many ties."""
    x = torch.randn(m, k, device="cuda") * torch.exp(torch.randn(k, device="cuda"))
    return torch.where(torch.rand(m, k, device="cuda") < 0.2, x.round(), x).to(dtype)


def windows(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation, and its places."""
    permutation = in_windows(k, seed=k).cuda()
    places = reference.places_of(permutation)
    assert places is not None
    return permutation, places


def assert_equal(got: ops.Sparsified, want: ops.Sparsified) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 32, 64, 128])
@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("k", KS)
def test_the_result_is_that_of_gathering_before(k: int, m: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    """Sums run over the same elements in the same order, so that row scale and branch are the same to the bit, too."""
    x, (permutation, places) = random(m, k, dtype), windows(k)
    down = torch.randn(k, rank, device="cuda", dtype=dtype) if rank else None
    got = ops.sparsify(x, comp_down=down, values_dtype=values_dtype, places=places)
    assert_equal(got, ops.sparsify(x.index_select(1, permutation), comp_down=down, values_dtype=values_dtype))
    want = reference.sparsify(x, comp_down=down, values_dtype=values_dtype, places=places)
    assert torch.equal(got.metadata, want.metadata)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("branch_input", ["input", "dropped"])
@pytest.mark.parametrize("with_score, with_shift", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("m, k", [(65, 576), (512, 3072)], ids=str)
def test_score_and_shift_are_in_the_gathered_order(
    m: int,
    k: int,
    with_score: bool,
    with_shift: bool,
    branch_input: reference.BranchInput,
    dtype: torch.dtype,
    values_dtype: torch.dtype | None,
) -> None:
    x, (permutation, places) = random(m, k, dtype), windows(k)
    score = torch.rand(k, device="cuda") if with_score else None
    shift = torch.randn(k, device="cuda") if with_shift else None
    args = score, shift, torch.randn(k, 48, device="cuda", dtype=dtype), branch_input, True, reference.EPS, values_dtype
    assert_equal(ops.sparsify(x, *args, places=places), ops.sparsify(x.index_select(1, permutation), *args))


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 16, 32, 64])
# Heads: none; some of the first two pieces; all of one and some of the others.
@pytest.mark.parametrize("m, width, head", [(129, 1152, 0), (65, 1152, 832), (65, 3072, 1088)], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "gelu", "silu_gate"])
def test_activation(
    activation: Activation, m: int, width: int, head: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None
) -> None:
    """Whatever the last bit of the kernel's own activation is, it is the same in either order."""
    x, gate = torch.cat([random(m, width, dtype), torch.randn(m, width, device="cuda", dtype=dtype)], 1).chunk(2, 1)
    before = random(m, head + 128, dtype)[:, 64 : 64 + head] if head else None
    what = activation, gate if activation == "silu_gate" else None, before
    k = head + width
    permutation, places = windows(k)
    down = torch.randn(k, rank, device="cuda", dtype=dtype) if rank else None
    args = None, None, down, "dropped", True, reference.EPS, values_dtype, 1.0
    whole = as_the_kernel_has_it(x, *what)
    assert_equal(ops.sparsify(x, *args, *what, places=places), ops.sparsify(whole.index_select(1, permutation), *args))


def as_the_kernel_has_it(x: torch.Tensor, activation: Activation, gate: torch.Tensor | None, head: torch.Tensor | None) -> torch.Tensor:
    """``cat([head, act(x)])`` to the bit of the kernel: two selections, of which one keeps channels 0 and 1 and the other 2 and 3.

    Times infinity zero is NaN, which ranks above what zero times anything is.
    """
    k = x.shape[1] + (0 if head is None else head.shape[1])
    whole = torch.empty(x.shape[0], k, device="cuda", dtype=x.dtype)
    for score in ([torch.inf, torch.inf, 0, 0], [0, 0, torch.inf, torch.inf]):
        kept = ops.sparsify(x, torch.tensor(score, device="cuda").repeat(k // 4), activation=activation, gate=gate, head=head)
        columns = reference.kept_columns(kept.metadata, x.shape[0], k)
        whole.scatter_(1, columns, kept.values)
    return whole


@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("layout", ["rows apart", "rows misaligned", "columns apart"])
def test_strided_input(layout: str, values_dtype: torch.dtype | None) -> None:
    wide = torch.randn(40, 264, device="cuda", dtype=torch.bfloat16)
    x = {
        "rows apart": wide[:, 8:200],
        "rows misaligned": wide[:, 1:193],
        "columns apart": torch.randn(192, 40, device="cuda").bfloat16().T,
    }[layout]
    permutation, places = windows(192)
    got = ops.sparsify(x, values_dtype=values_dtype, places=places)
    assert_equal(got, ops.sparsify(x.contiguous().index_select(1, permutation), values_dtype=values_dtype))


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_non_finite_values_spoil_only_their_row(values_dtype: torch.dtype | None) -> None:
    x, (permutation, places) = torch.randn(70, 128, device="cuda", dtype=torch.bfloat16), windows(128)
    x[3, 5], x[4, 6], x[5, 7] = float("nan"), float("inf"), -float("inf")
    got = ops.sparsify(x, values_dtype=values_dtype, places=places)
    want = ops.sparsify(x.index_select(1, permutation), values_dtype=values_dtype)
    assert torch.equal(got.metadata, want.metadata)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert not got.row_scale[3:6].isfinite().any() and got.row_scale[[*range(3), *range(6, 70)]].isfinite().all()


def test_runs_are_reproducible() -> None:
    x, (_, places) = random(1000, 3072, torch.bfloat16), windows(3072)
    down = torch.randn(3072, 64, device="cuda", dtype=torch.bfloat16)
    first, second = (ops.sparsify(x, comp_down=down, places=places) for _ in range(2))
    assert_equal(first, second)


@torch.no_grad()
def test_a_layer_gathers_in_its_selection() -> None:
    layer = SparseLinear(1152, 256, device="cuda", dtype=torch.bfloat16)
    layer.set_compensation(torch.randn(1152, 64) / 16, torch.randn(256, 64) / 16, torch.randn(1152) / 4, permutation=in_windows(1152))
    layer.small_m = "sparse"
    x = random(129, 1152, torch.bfloat16)
    assert layer.places is not None and layer.places.is_cuda
    got, layer.places = layer(x), None
    assert torch.equal(got, layer(x))
