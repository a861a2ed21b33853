"""The tile table's bench: what it fits to times, how it judges the plan, and which kernels it times."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rtlynx import _core, launch
from rtlynx.bench import machine, tiles
from rtlynx.bench.tiles import KernelTime, fit_tiles, kernel_times, plan_losses
from rtlynx.cli import app
from rtlynx.plans import Problem

SMS = 132
GPU = {"index": 0, "name": "H", "capability": (9, 0), "sms": SMS, "memory_bytes": 1, "memory_gb_s": 4916}
TABLE = {(256, 192): (596.0, 612.0, 6050.0), (192, 160): (446.0, 484.0, 3080.0), (128, 128): (332.0, 391.0, 1290.0)}
LAYERS = [(m, n, k) for m in (256, 1000, 4608) for n, k in ((3072, 3072), (3072, 12288), (12288, 3072), (1152, 1152))]


def made_up(layers: Sequence[tuple[int, int, int]] = LAYERS, noise: float = 0.0) -> list[KernelTime]:
    """Rows whose times are those of `TABLE`, with a launch of 4 us."""
    chance, rows = random.Random(0), []
    for m, n, k in layers:
        for dtype, step in (("bfloat16", 64), ("bfloat16_e4m3", 128)):
            for (bm, bn), times in TABLE.items():
                name = f"spmm_sm90_{'bf16e4m3' if step == 128 else 'bf16'}_{bm}x{bn}x{step}_s5"
                steps, count = KernelTime(m, n, k, 64, dtype, name, False, 0.0).work(SMS)
                ns = 4000 + steps * times[step == 128] + count * times[2]
                rows.append(KernelTime(m, n, k, 64, dtype, name, (bm, bn) == (256, 192), ns * 1e-6 * (1 + noise * chance.uniform(-1, 1))))
    return rows


def test_the_busiest_multiprocessor_counts() -> None:
    row = KernelTime(4608, 3072, 3100, 64, "bfloat16", "spmm_sm90_bf16_192x192x64_s6", True, 1.0)
    assert row.tile == (192, 192, 64, 6)
    assert row.work(SMS) == (3 * 49, 3)  # 24 x 16 tiles on 132, 49 stages of K
    with pytest.raises(ValueError, match="does not name its tile"):
        _ = KernelTime(1, 8, 64, 0, "bfloat16", "row_stats_bf16", True, 1.0).tile


@pytest.mark.parametrize("noise, tolerance", [(0.0, 1e-3), (0.03, 0.15)])
def test_the_fit_finds_the_table_that_times_come_from(noise: float, tolerance: float) -> None:
    fitted = fit_tiles(made_up(noise=noise), SMS)
    assert [one.tile for one in fitted] == ["256x192", "192x160", "128x128"]
    for one, times in zip(fitted, TABLE.values(), strict=True):
        assert (one.step_ns, one.e4m3_step_ns) == pytest.approx(times[:2], rel=tolerance)
        assert one.tile_ns == pytest.approx(times[2], rel=3 * tolerance, abs=1500 * (noise > 0))


def test_what_was_not_measured_is_not_made_up() -> None:
    fitted = fit_tiles([row for row in made_up() if row.dtype == "bfloat16"], SMS)
    assert all(math.isnan(one.e4m3_step_ns) and one.step_ns > 0 for one in fitted)


def test_losses_are_those_of_the_planned_kernel() -> None:
    losses = plan_losses(made_up([(4608, 12288, 3072), (256, 1152, 1152)]))
    assert losses[Problem(4608, 12288, 3072, 64, "bfloat16")] == 0
    assert losses[Problem(256, 1152, 1152, 64, "bfloat16")] > 0.3
    assert len(losses) == 4


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Problem, Sequence[str], str | None]]:
    """A Hopper that is not there; what was asked to be timed."""
    asked: list[tuple[Problem, Sequence[str], str | None]] = []

    def measure(
        _core: object, _index: int, problem: Problem, kernels: Sequence[str], before: str | None, _repeats: int
    ) -> dict[str, float]:
        asked.append((problem, kernels, before))
        return {kernel: 1.0 + i for i, kernel in enumerate(kernels)}

    core = SimpleNamespace(devices=lambda: [GPU], plan_sparse_linear=_core.plan_sparse_linear, candidates=_core.candidates)
    monkeypatch.setattr(launch, "core", lambda: core)
    monkeypatch.setattr(tiles.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles.Machine, "of", lambda *_: "machine")
    monkeypatch.setattr(tiles.plans, "load", lambda _: {Problem(512, 3072, 3072, 64, "bfloat16"): "tuned"})
    monkeypatch.setattr(tiles, "measure_kernels", measure)
    return asked


def test_all_kernels_of_the_gpu_are_timed_and_the_tuned_one_is_put_back(timed: list[tuple[Problem, Sequence[str], str | None]]) -> None:
    rows = kernel_times([(512, 3072, 3072), (4608, 12288, 3072)], 64, 3)
    assert [(problem.m, problem.dtype, before) for problem, _, before in timed] == [
        *[(512, "bfloat16", "tuned"), (512, "bfloat16_e4m3", None)],
        *[(4608, "bfloat16", None), (4608, "bfloat16_e4m3", None)],
    ]
    for _, kernels, _ in timed:
        assert len(kernels) == len(set(kernels)) == 5 and all(kernel.startswith("spmm_sm90_") for kernel in kernels)
    assert [row.kernel for row in rows if row.planned] == [
        *["spmm_sm90_bf16_128x128x64_s8", "spmm_sm90_bf16e4m3_128x128x128_s8"],
        *["spmm_sm90_bf16_256x192x64_s5", "spmm_sm90_bf16e4m3_256x192x128_s5"],
    ]


def test_older_gpus_are_not_asked_for_e4m3(timed: list[tuple[Problem, Sequence[str], str | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPU, "capability", (8, 0))
    rows = kernel_times([(4608, 12288, 3072)], 64, 3)
    assert [problem.dtype for problem, _, _ in timed] == ["bfloat16"]
    assert len(rows) == 4 and all(row.kernel.startswith("spmm_sm80_") for row in rows)


def test_the_command_writes_every_time(
    timed: list[tuple[Problem, Sequence[str], str | None]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rtlynx.cli.bench.require_gpu", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(multi_processor_count=SMS))
    monkeypatch.setattr(machine, "describe", lambda command, *_: [f"command: {command}"])
    monkeypatch.setattr(machine, "gpu_slug", lambda: "gpu")
    result = CliRunner().invoke(app, ["bench", "tiles", "--shapes", "odd", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "256x192" in result.output and "longer than the fastest on average" in result.output
    lines = (tmp_path / "gpu" / "tiles.csv").read_text().splitlines()
    assert lines[0] == "# command: rtlynx bench tiles --shapes odd --rank 64 --repeats 11"
    rows = list(csv.DictReader(lines[1:]))
    assert len(rows) == len(timed) * 5 and {row["planned"] for row in rows} == {"True", "False"}
