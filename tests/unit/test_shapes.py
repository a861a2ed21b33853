"""The problems that GPU tests run reach what they are meant to: every layer of the models, every GEMM kernel at its edges."""

from __future__ import annotations

import re

import pytest

from full_size_models import CASES
from pinned_layers import pinned
from rtlynx import _core
from shapes import KERNEL_DEPTHS, KERNEL_RANKS, KERNEL_SIZES, MANY_TILES, MODEL_SHAPES

HOPPER, PORTABLE = ((9, 0), 132), ((8, 0), 108)


def test_every_layer_of_the_full_size_models_is_among_the_shapes() -> None:
    layers = {(layer.out_features, layer.in_features) for name in CASES for layer in pinned(name) if not layer.why_dense}
    assert layers <= {(n, k) for _, n, k in MODEL_SHAPES}
    assert len(MODEL_SHAPES) == len(set(MODEL_SHAPES))


def kernels(gpu: tuple[tuple[int, int], int], dtype: str) -> dict[str, tuple[int, int, int, int]]:
    """The GEMM kernels that can run every problem of tests/gpu/test_every_kernel.py: name → rows, columns, K of a step, stages."""
    problems = [(m, n, k, rank) for m, n in KERNEL_SIZES for k in KERNEL_DEPTHS for rank in KERNEL_RANKS]
    problems += [(*MANY_TILES, k, 32) for k in KERNEL_DEPTHS]
    (names,) = {tuple(_core.candidates(*gpu, *problem, dtype)) for problem in problems}
    numbers = {name: re.search(r"_(\d+)x(\d+)x(\d+)_s(\d+)$", name) for name in names}
    assert all(numbers.values())
    return {name: tuple(map(int, found.groups())) for name, found in numbers.items() if found}  # type: ignore[misc]


@pytest.mark.parametrize("dtype, short", [("bfloat16", "bf16"), ("float16", "f16")])
def test_every_kernel_runs_at_its_edges(dtype: str, short: str) -> None:
    plain, fp8 = kernels(HOPPER, dtype), kernels(HOPPER, f"{dtype}_e4m3")
    tiles = [f"sm90_{short}_{tile}" for tile in ("256x192x64_s5", "192x192x64_s6", "192x160x64_s6", "128x192x64_s7", "128x128x64_s8")]
    portable = [f"sm80_{short}_{tile}x64_s4" for tile in ("256x128", "128x128", "128x64", "64x64")]
    assert list(plain) == [f"spmm_{name}" for name in tiles + portable]
    assert list(kernels(PORTABLE, dtype)) == [f"spmm_{name}" for name in portable]
    assert list(fp8) == [f"spmm_{name}" for name in (tile.replace(f"{short}_", f"{short}e4m3_").replace("x64_", "x128_") for tile in tiles)]
    for name, (rows, columns, step, stages) in (plain | fp8).items():
        steps = {-(-k // step) for k in KERNEL_DEPTHS}
        assert min(steps) == 1 and any(1 < count < stages for count in steps) and max(steps) > stages, name
        assert step == 64 or {k % step for k in KERNEL_DEPTHS} == {0, 64}, name
        (m, n), (more_m, more_n) = KERNEL_SIZES
        assert m < rows < more_m and n < columns < more_n and more_m % rows and more_n % columns, name
        m, n = MANY_TILES
        assert -(-m // rows) * -(-n // columns) > HOPPER[1] and m % rows and n % columns, name
