"""Every GEMM kernel, not the planned one alone, where its tiles, its pipeline and the branch behind it are partly filled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

from rtlynx import _core, fp8, launch, ops, reference
from rtlynx.plans import Problem
from shapes import KERNEL_DEPTHS, KERNEL_RANKS, KERNEL_SIZES, MANY_TILES, OPERANDS

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
TOLERANCE_FP8 = {torch.bfloat16: 5e-3, torch.float16: 3e-3}
"""As in test_sparse_linear.py."""


def kernels_of(problem: Problem) -> list[str]:
    gpu = launch.core().devices()[torch.cuda.current_device()]
    return _core.candidates(gpu["capability"], gpu["sms"], **asdict(problem))  # type: ignore[arg-type]


@contextmanager
def running(problem: Problem, kernel: str) -> Iterator[None]:
    """Run this kernel for the problem, whatever is planned for it or was tuned."""
    index = torch.cuda.current_device()
    _core.set_plan(index, **asdict(problem), kernel=kernel)
    try:
        assert _core.gemm_kernel(index, **asdict(problem)) == kernel
        yield
    finally:
        _core.set_plan(index, **asdict(problem), kernel=None)


def check(m: int, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    """Every kernel against a float64 product, and with an epilogue, for which some are others, against torch's on what it gave without."""
    x, weight, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((m, k), (n, k), (n,)))
    residual, gate = (torch.randn(rows, n, device="cuda", dtype=dtype) for rows in (m, 1))
    down, up = (torch.randn(size, rank, device="cuda", dtype=dtype) / rank**0.5 for size in (k, n)) if rank else (None, None)
    weight /= k**0.5
    scale = out_dtype = None
    tolerance = TOLERANCE[dtype]
    if values_dtype is not None:
        (weight, scale), out_dtype, tolerance = fp8.quantize_weight(weight), dtype, TOLERANCE_FP8[dtype]
    sparse = ops.sparsify(x, comp_down=down, values_dtype=values_dtype)
    want = reference.decompress(sparse.values, sparse.metadata).double() @ weight.double().T
    if scale is not None:
        want *= scale.double()
    want = want * sparse.row_scale.double()[:, None] + bias.double()
    if up is not None:
        want += sparse.branch.double() @ up.double().T
    branch = sparse.branch if rank else None
    arguments = sparse.values, sparse.metadata, weight, sparse.row_scale, branch, up, bias, scale, out_dtype
    problem = Problem(m, n, k, rank, fp8.kernel_dtype(dtype, values_dtype))
    kernels = kernels_of(problem)
    assert len(kernels) >= 3
    for kernel in kernels:
        with running(problem, kernel):
            out = ops.sparse_linear(*arguments)
            finished = ops.sparse_linear(*arguments, residual=residual, gate=gate)
        assert out.shape == want.shape and out.dtype == dtype
        assert (out.double() - want).norm() / want.norm() < tolerance, kernel
        assert torch.equal(finished, reference.finished(out, residual=residual, gate=gate)), kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("rank", KERNEL_RANKS)
@pytest.mark.parametrize("k", KERNEL_DEPTHS)
@pytest.mark.parametrize("m, n", KERNEL_SIZES, ids=str)
def test_partly_filled(m: int, n: int, k: int, rank: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check(m, n, k, rank, dtype, values_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("k", [64, 320])
def test_a_block_with_several_tiles(k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check(*MANY_TILES, k, 32, dtype, values_dtype)
