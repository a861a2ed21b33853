"""What of the benches needs no GPU: the result file, the mean, the command's answer without one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rtlynx.bench.layer import LayerTimes, geometric_mean, write_csv
from rtlynx.bench.shapes import SHAPES
from rtlynx.cli import app
from rtlynx.reference import K_MULTIPLE, N_MULTIPLE

ROW = LayerTimes(
    m=4096,
    n=3072,
    k=3072,
    rank=64,
    dense_ms=0.125,
    gemm_ms=0.1,
    select_ms=0.02,
    layer_ms=0.12,
    gemm_tflops=773.1,
    speedup=1.0417,
    fp8_ms=float("nan"),
    copy_ms=0.01,
)


def test_results_are_a_csv_under_header_lines(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200" / "layer.csv"
    write_csv(path, ["gpu: NVIDIA H200", "commit abc"], [ROW, ROW])
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# gpu: NVIDIA H200", "# commit abc"]
    rows = list(csv.DictReader(lines[2:]))
    assert len(rows) == 2
    assert list(rows[0])[:10] == ["m", "n", "k", "rank", "dense_ms", "gemm_ms", "select_ms", "layer_ms", "gemm_tflops", "speedup"]
    assert float(rows[0]["dense_ms"]) == ROW.dense_ms and rows[0]["fp8_ms"] == "nan"


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_every_shape_is_one_the_kernels_serve() -> None:
    for shapes in SHAPES.values():
        assert all(k % K_MULTIPLE == 0 and n % N_MULTIPLE == 0 for _, n, k in shapes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    result = CliRunner().invoke(app, ["bench", "gemm"])
    assert result.exit_code == 2
    assert "no GPU" in result.output
