"""Every kernel that tuning can choose gives the right result, the chosen one runs, and later processes find it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import rtlynx
from rtlynx import SparseLinear, SparsityConfig, _core, launch, ops, plans, reference
from rtlynx.plans import Machine, Problem

RAGGED = [(65, 120, 576, 48), (1000, 1160, 320, 0), (600, 3080, 2432, 80)]
"""(M, N, K, rank) that leave every tile partly filled, with more tiles than fit side by side and with fewer."""
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
"""As in test_sparse_linear.py: twice what one rounding of the result is."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No plans from other runs, and none left behind."""
    launch.core()  # has read the user's by now
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path))
    known: set[tuple[int, Problem]] = set()
    set_plan = _core.set_plan

    def remember(device_index: int, *sizes: object, kernel: str | None = None, **problem: object) -> None:
        known.add((device_index, Problem(*sizes, **problem)))  # type: ignore[arg-type]
        set_plan(device_index, *sizes, **problem, kernel=kernel)  # type: ignore[arg-type, misc]

    monkeypatch.setattr(_core, "set_plan", remember)
    yield tmp_path
    for index, problem in known:
        set_plan(index, **asdict(problem), kernel=None)


def candidates(problem: Problem) -> list[str]:
    gpu = _core.devices()[torch.cuda.current_device()]
    return _core.candidates(gpu["capability"], gpu["sms"], **asdict(problem))  # type: ignore[arg-type]


def running(problem: Problem) -> str:
    return _core.gemm_kernel(torch.cuda.current_device(), **asdict(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m, n, k, rank", RAGGED, ids=str)
def test_every_candidate_gives_the_right_result(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    problem = Problem(m, n, k, rank, str(dtype).removeprefix("torch."))
    x, weight, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((m, k), (n, k), (n,)))
    weight /= k**0.5
    down, up = (torch.randn(size, rank, device="cuda", dtype=dtype) / rank**0.5 for size in (k, n)) if rank else (None, None)
    sparse = ops.sparsify(x, comp_down=down)
    want = reference.decompress(sparse.values, sparse.metadata).double() @ weight.double().T
    want = want * sparse.row_scale.double()[:, None] + bias.double()
    if up is not None:
        want += sparse.branch.double() @ up.double().T
    kernels = candidates(problem)
    assert len(kernels) >= 3
    for kernel in kernels:
        _core.set_plan(torch.cuda.current_device(), **asdict(problem), kernel=kernel)
        assert running(problem) == kernel
        out = ops.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale, sparse.branch if rank else None, up, bias)
        assert (out.double() - want).norm() / want.norm() < TOLERANCE[dtype], kernel


def test_what_is_found_runs_and_is_found_again(folder: Path) -> None:
    problems = [Problem(*sizes) for sizes in RAGGED]
    state = torch.cuda.get_rng_state()
    found = rtlynx.autotune(RAGGED, repeats=3)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [one.problem for one in found] == problems
    for one in found:
        assert set(one.milliseconds) == set(candidates(one.problem)) and all(time > 0 for time in one.milliseconds.values())
        assert running(one.problem) == one.kernel
        _core.set_plan(torch.cuda.current_device(), **asdict(one.problem), kernel=None)
        assert running(one.problem) == one.planned
    plans.use_saved(_core)
    assert [running(problem) for problem in problems] == [one.kernel for one in found]
    assert [one.milliseconds for one in rtlynx.autotune(RAGGED)] == [{}] * len(RAGGED)


def test_a_model_is_tuned_wherever_its_weights_are() -> None:
    layer = SparseLinear(256, 512, device="meta", dtype=torch.bfloat16, config=SparsityConfig(small_m="sparse"))
    (one,) = rtlynx.autotune(torch.nn.Sequential(layer), tokens=300, repeats=1)
    assert one.problem == Problem(300, 512, 256, 0)
    on_gpu = torch.nn.Sequential(layer.to_empty(device="cuda"))
    (row,) = rtlynx.summary(on_gpu, tokens=300)
    assert row.kernel == one.kernel
    other = next(kernel for kernel in candidates(one.problem) if kernel != one.kernel)
    _core.set_plan(torch.cuda.current_device(), **asdict(one.problem), kernel=other)
    (row,) = rtlynx.summary(on_gpu, tokens=300)
    assert row.kernel == other


def test_a_later_process_finds_it_with_its_first_op(folder: Path) -> None:
    problem = Problem(100, 264, 128, 0)
    planned = running(problem)
    other = next(kernel for kernel in candidates(problem) if kernel != planned)
    plans.save(Machine.of(_core, _core.devices()[0]), {problem: other})
    program = """
import torch
from rtlynx import _core, ops
kernel = lambda: _core.gemm_kernel(0, 100, 264, 128, 0, "bfloat16")
before = kernel()
ops.sparsify(torch.randn(1, 64, device="cuda:0").bfloat16())
print(before, kernel())
"""
    environment = os.environ | {"RTLYNX_CACHE_DIR": str(folder)}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split() == [planned, other]
