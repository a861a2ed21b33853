"""`rtlynx.autotune` on a pretended machine: what it measures, what it keeps, what it refuses. tests/gpu measures for real."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import rtlynx
from rtlynx import DeviceError, InvalidArgumentError, SparseLinear, _core, launch, plans
from rtlynx.bench.show import tuned_table
from rtlynx.plans import Problem

autotune = importlib.import_module("rtlynx.autotune")  # the attribute of the package is the function

ATTENTION, MLP = (4096, 3072, 3072, 64), (4096, 12288, 3072, 64)
GPU = {"index": 0, "name": "NVIDIA H200", "capability": (9, 0), "sms": 132}


class Machine:
    """Two GPUs of a kind. `slow` has kernels that take longer than the others; `asked` says what was measured, `running` what is set."""

    def __init__(self) -> None:
        self.running: dict[tuple[int, Problem], str | None] = {}
        self.asked: list[Problem] = []
        self.best = "spmm_sm80_bf16_64x64x64_s4"
        self.margin = 0.5
        self.core = SimpleNamespace(
            devices=lambda: [GPU, GPU | {"index": 1}],
            driver_version=lambda: (13, 0),
            candidates=_core.candidates,
            plan_sparse_linear=_core.plan_sparse_linear,
            set_plan=self.set_plan,
        )

    def set_plan(self, index: int, kernel: str | None, **problem: Any) -> None:
        self.running[index, Problem(**problem)] = kernel

    def measure(
        self, core: Any, index: int, problem: Problem, kernels: Sequence[str], before: str | None, repeats: int
    ) -> dict[str, float]:
        assert _core.plan_sparse_linear(GPU["capability"], GPU["sms"], **vars(problem)) in kernels  # type: ignore[arg-type]
        self.asked.append(problem)
        return {kernel: self.margin if kernel == self.best else 1.0 for kernel in kernels}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    pretended = Machine()
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "core", lambda: pretended.core)
    monkeypatch.setattr(autotune, "measure_kernels", pretended.measure)
    monkeypatch.setattr(SparseLinear, "least_tokens", lambda self, device: 1000)
    yield pretended


def test_the_fastest_runs_on_every_gpu_and_is_saved(machine: Machine, tmp_path: Path) -> None:
    found = rtlynx.autotune([ATTENTION, MLP, ATTENTION])
    assert [one.problem for one in found] == [Problem(*ATTENTION), Problem(*MLP)] == machine.asked
    assert all(one.kernel == machine.best and one.gain == 2.0 and one.planned.startswith("spmm_sm90") for one in found)
    assert machine.running == {(index, one.problem): machine.best for index in (0, 1) for one in found}
    (path,) = (tmp_path / "plans").iterdir()
    assert [plan["kernel"] for plan in json.loads(path.read_text())["plans"]] == [machine.best] * 2


def test_what_is_known_is_measured_again_only_when_asked_for(machine: Machine) -> None:
    rtlynx.autotune([ATTENTION])
    known, new = rtlynx.autotune([ATTENTION, MLP])
    assert machine.asked == [Problem(*ATTENTION), Problem(*MLP)]
    assert known.kernel == machine.best and not known.milliseconds and math.isnan(known.gain) and new.gain == 2.0
    machine.best = "spmm_sm80_bf16_128x64x64_s4"
    (one,) = rtlynx.autotune([ATTENTION], again=True)
    assert one.kernel == machine.best == machine.running[0, one.problem]


def test_less_than_noise_is_no_reason_to_leave_the_plan(machine: Machine) -> None:
    machine.margin = 0.995
    (one,) = rtlynx.autotune([ATTENTION])
    assert one.kernel == one.planned and one.gain == 1.0


def test_an_interrupted_run_keeps_what_it_has(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> dict[str, float]:
        if machine.asked:
            raise KeyboardInterrupt
        return machine.measure(*arguments)

    monkeypatch.setattr(autotune, "measure_kernels", measure)
    with pytest.raises(KeyboardInterrupt):
        rtlynx.autotune([ATTENTION, MLP])
    monkeypatch.setattr(autotune, "measure_kernels", machine.measure)
    rtlynx.autotune([ATTENTION, MLP])
    assert machine.asked == [Problem(*ATTENTION), Problem(*MLP)]


def test_a_cache_that_cannot_be_written_is_a_warning(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(plans, "save", save)
    with pytest.warns(UserWarning, match="holds for this process only.*RTLYNX_CACHE_DIR"):
        (one,) = rtlynx.autotune([ATTENTION])
    assert machine.running[1, one.problem] == machine.best


def sparse_model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 256)).to(dtype)
    return rtlynx.apply(model, rtlynx.SparsityConfig(include=("*",)))


def test_a_model_gives_its_different_products(machine: Machine) -> None:
    model = sparse_model()
    model[1].set_compensation(torch.zeros(256, 16), torch.zeros(128, 16))  # type: ignore[index, operator, union-attr]
    found = rtlynx.autotune(model, tokens=(1000, 4096))
    assert [one.problem for one in found] == [Problem(m, *sizes) for sizes in ((256, 128, 0), (128, 256, 16)) for m in (1000, 4096)]


def test_precision_is_part_of_a_product(machine: Machine) -> None:
    (one,) = rtlynx.autotune([ATTENTION], precision="fp8")
    assert one.problem == Problem(*ATTENTION, "bfloat16_e4m3")
    model = rtlynx.apply(sparse_model(torch.float16), rtlynx.SparsityConfig(include=("*",), precision="fp8"))
    assert {found.problem.dtype for found in rtlynx.autotune(model)} == {"float16_e4m3"}


def test_layers_that_run_dense_are_left_out(machine: Machine) -> None:
    assert [one.problem.m for one in rtlynx.autotune(sparse_model(), tokens=(999, 1000))] == [1000] * 2
    with pytest.raises(InvalidArgumentError, match=r"`tokens`: got \(999,\), expected at least 1000"):
        rtlynx.autotune(sparse_model(), tokens=999)
    model = rtlynx.apply(sparse_model(), rtlynx.SparsityConfig(include=("*",), small_m="sparse"))
    assert [one.problem.m for one in rtlynx.autotune(model, tokens=1)] == [1] * 2


def test_refusals_come_before_any_measurement(machine: Machine) -> None:
    dense = nn.Sequential(nn.Linear(64, 64))
    for arguments, message in (
        ({"model_or_problems": dense}, "without sparse layers"),
        ({"model_or_problems": object()}, "autotune: argument `pipe_or_module`"),
        ({"model_or_problems": [ATTENTION, (0, 64, 64, 0)]}, "m at least 1"),
        ({"model_or_problems": [ATTENTION, (64, 64, 64)]}, "four integers"),
        ({"model_or_problems": [ATTENTION, (64, 64, 65, 0)]}, "`k`: got 65"),
        ({"model_or_problems": [ATTENTION], "dtype": torch.float32}, "`dtype`: got float32"),
        ({"model_or_problems": sparse_model(torch.float32)}, "`dtype`: got float32"),
        ({"model_or_problems": [ATTENTION], "precision": "fp4"}, "`precision`: got 'fp4'"),
        ({"model_or_problems": [ATTENTION], "device": "cpu"}, "`device`: got cpu"),
        ({"model_or_problems": [ATTENTION], "device": 2}, "`device`: got cuda:2, expected one of 2 GPUs"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            rtlynx.autotune(**arguments)  # type: ignore[arg-type]
    assert not machine.asked and not machine.running


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(DeviceError, match="there is no GPU to measure"):
        rtlynx.autotune([ATTENTION])


def test_the_first_gpu_op_uses_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []
    monkeypatch.setattr(plans, "use_saved", used.append)
    launch.core.cache_clear()
    assert launch.core() is launch.core() is _core
    launch.core.cache_clear()
    assert used == [_core]


def test_what_was_found_is_a_table(machine: Machine) -> None:
    rtlynx.autotune([ATTENTION])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tuned_table(rtlynx.autotune([ATTENTION, MLP])))
    known, new = [line for line in console.export_text().splitlines() if "4096" in line]
    assert "–" in known and "2.000" in new and machine.best in known
