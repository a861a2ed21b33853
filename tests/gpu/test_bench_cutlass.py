"""CUTLASS as a peer of the bench: all its kernels give the product of what selection kept. Skipped where it cannot be compiled."""

from __future__ import annotations

import pytest
import torch

from rtlynx import ops
from rtlynx.bench import cutlass
from rtlynx.bench.peer import Operands, Unavailable


@pytest.mark.parametrize("m, n, k", [(512, 768, 1024), (77, 200, 192)])
def test_every_kernel_gives_the_product(m: int, n: int, k: int) -> None:
    x, weight, bias = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
    try:
        calls = cutlass.calls(Operands(x, weight, bias, None, None, ops.sparsify(x)))  # compares before it returns
    except Unavailable as missing:
        pytest.skip(str(missing))
    assert len(calls) == len(cutlass.SWIZZLES) * cutlass._library().rtlynx_cutlass_count()
