"""What of the benches needs no GPU: result files, what is read off them, pictures, the commands' answers without one."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rtlynx import _core
from rtlynx.bench import peers, probe
from rtlynx.bench.energy import Energy
from rtlynx.bench.peer import Operands, Unavailable
from rtlynx.bench.peers import prepare
from rtlynx.bench.plot import plots
from rtlynx.bench.probe import Limits
from rtlynx.bench.results import break_even, geometric_mean, write_csv
from rtlynx.bench.shapes import FEATURES, FEW_TOKENS, SHAPES
from rtlynx.cli import app
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.layer_times import LayerTimes, read_csv
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
    copy_ms=0.01,
    kernel="spmm_sm90_bf16_256x192x64_s5",
)
LIMITS = Limits(
    tflops={"dense_ss": 812.4, "sparse_ss": 1391.0, "main_loop": 1270.6},
    cycles={"dense_ss": 96.0, "sparse_ss": 112.0},
    mhz={"dense_ss": 1613.0, "sparse_ss": 1644.2},
    copy_gb_s=4123.0,
)
HEADER = ["gpu: NVIDIA H200", "torch: 2.11.0", *LIMITS.header()]


def row(m: int, layer_ms: float, n: int = 3072, k: int = 3072) -> LayerTimes:
    return dataclasses.replace(ROW, m=m, n=n, k=k, dense_ms=1.0, layer_ms=layer_ms, speedup=1 / layer_ms)


def test_results_are_a_csv_under_header_lines(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200" / "layer.csv"
    write_csv(path, ["gpu: NVIDIA H200", "commit abc"], [ROW, ROW])
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# gpu: NVIDIA H200", "# commit abc"]
    rows = list(csv.DictReader(lines[2:]))
    assert len(rows) == 2
    assert list(rows[0])[:10] == ["m", "n", "k", "rank", "dense_ms", "gemm_ms", "select_ms", "layer_ms", "gemm_tflops", "speedup"]
    assert list(rows[0])[-5:] == ["kernel", "gemm_e4m3_ms", "select_e4m3_ms", "layer_e4m3_ms", "speedup_e4m3"]
    assert float(rows[0]["dense_ms"]) == ROW.dense_ms and rows[0]["fp8_ms"] == "nan"


def test_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    write_csv(path, HEADER, [ROW])
    header, (back,) = read_csv(path)
    assert header["gpu"] == "NVIDIA H200" and header["limit sparse_ss, TFLOP/s"] == "1391"
    for field in dataclasses.fields(LayerTimes):
        expected, got = getattr(ROW, field.name), getattr(back, field.name)
        assert got == expected or (math.isnan(got) and math.isnan(expected)), field.name


def test_results_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    path.write_text("# gpu: NVIDIA H200\nm,n,k,rank,dense_ms,gemm_ms,select_ms,layer_ms,gemm_tflops,speedup\n1,8,64,0,2,1,1,2,0.5,1\n")
    _, (back,) = read_csv(path)
    assert (back.m, back.layer_ms) == (1, 2.0) and math.isnan(back.fused_ms) and math.isnan(back.speedup_e4m3)


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_break_even_is_where_the_sparse_layer_stays_ahead() -> None:
    rows = [row(1, 2.0), row(512, 0.9), row(1024, 1.1), row(2048, 1.0), row(3072, 0.7)]
    assert break_even(rows) == {(3072, 3072): 2048}
    assert break_even([*rows, row(4096, 1.2)]) == {(3072, 3072): None}
    assert break_even([row(1, 0.5, k=64), row(2, 0.5, k=64), row(1, 0.5)]) == {(3072, 64): 1}


def test_every_shape_is_one_the_kernels_serve() -> None:
    for shapes in SHAPES.values():
        assert all(k % K_MULTIPLE == 0 and n % N_MULTIPLE == 0 for _, n, k in shapes)
        assert len(set(shapes)) == len(shapes)


def test_few_tokens_are_measured_in_batches_and_for_every_layer() -> None:
    assert {m * batch for m in (1, 33, 77, 512) for batch in (1, 2, 4)} | {3072} == set(FEW_TOKENS)
    assert {(n, k) for _, n, k in SHAPES["dit"] if n != 8192} <= set(FEATURES)


def test_few_layers_are_drawn_as_bars_and_under_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    write_csv(path, HEADER, [ROW, dataclasses.replace(ROW, n=12288, fp8_ms=0.07)])
    written = plots(path)
    assert [picture.name for picture in written] == ["layer_bars.svg", "layer_roofline.svg"]
    before = [picture.read_bytes() for picture in written]
    assert all(b"<svg" in picture for picture in before)
    assert [picture.read_bytes() for picture in plots(path)] == before  # nothing changes where no figure did


def test_a_file_without_limits_is_drawn_too(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    write_csv(path, ["gpu: NVIDIA H200"], [ROW])
    assert len(plots(path)) == 2


def test_many_layers_are_drawn_over_their_tokens(tmp_path: Path) -> None:
    path = tmp_path / "layer_small.csv"
    write_csv(path, HEADER, [row(m, 0.9, n=n) for m in FEW_TOKENS for n in (64, 128)])
    assert [picture.name for picture in plots(path)] == ["layer_small_speedup.svg"]


def test_result_files_are_drawn_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "layer.csv"
    write_csv(path, HEADER, [ROW])
    result = CliRunner().invoke(app, ["bench", "plot", str(path)])
    assert result.exit_code == 0 and "layer_roofline.svg" in result.output


def test_a_peer_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(layer: Operands) -> peers.Calls:
        raise Unavailable("it is not installed")

    def failing(layer: Operands) -> peers.Calls:
        def call() -> None:
            raise RuntimeError("no kernel for this shape\nand a long explanation")

        return {"failing": call}

    monkeypatch.setattr(peers, "PEERS", {"absent": absent, "failing": failing, "there": lambda layer: {"there": lambda: None}})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    x = torch.empty(1, 64)
    calls, missing = prepare(Operands(x, x, x, None, None, sparse=None))  # type: ignore[arg-type]
    assert list(calls) == ["there"]
    assert missing == {"absent": "it is not installed", "failing": "no kernel for this shape"}


def test_every_call_of_a_peer_has_its_column() -> None:
    columns = {field.name for field in dataclasses.fields(LayerTimes)}
    assert {"fp8_ms", "cusparselt_mm_ms", "cusparselt_compress_ms", "cutlass_mm_ms", "fused_ms"} <= columns


@pytest.mark.parametrize("argument, got", [("name", "sparse"), ("steps", 0), ("steps", 1 << 31), ("data", 0), ("cycles", 8)])
def test_the_probe_refuses_before_it_asks_for_a_driver(argument: str, got: object) -> None:
    arguments = dict(device_index=0, stream=0, name="dense_rs", steps=1, data=256, metadata=256, sums=256, cycles=256)
    with pytest.raises(InvalidArgumentError) as refusal:
        _core.probe(**arguments | {argument: got})  # type: ignore[arg-type]
    assert (refusal.value.op, refusal.value.argument) == ("probe", argument)


@pytest.mark.skipif(_core.driver_version() is not None, reason="this machine has a driver")
def test_the_probe_names_a_missing_driver() -> None:
    with pytest.raises(DeviceError, match="no usable NVIDIA driver"):
        _core.probe(device_index=0, stream=0, name="sparse_ss", steps=1, data=256, metadata=256, sums=256, cycles=256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
@pytest.mark.parametrize("command", ["gemm", "peak", "tune", "energy", "profile", "activation", "norm-rotary", "epilogue", "host"])
def test_without_a_gpu_the_command_says_so(command: str) -> None:
    result = CliRunner().invoke(app, ["bench", command])
    assert result.exit_code == 2
    assert "no GPU" in result.output


def test_without_the_instructions_there_are_no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self, name: str, device: torch.device) -> None: ...

        def run(self, steps: int) -> None:
            raise InvalidArgumentError("probe", "device_index", "a GPU of compute capability 8.0", "one of compute capability 9.0")

    monkeypatch.setattr(probe, "Probe", Refused)
    assert probe.probes(torch.device("cuda", 0)) == []


def test_energy_rows_are_written_with_their_columns(tmp_path: Path) -> None:
    row = Energy(4608, 12288, 3072, 64, "select", 0.025, math.nan, 512.5, 1980, 12.8125)
    write_csv(tmp_path / "energy.csv", ["gpu: none"], [row], Energy)
    lines = (tmp_path / "energy.csv").read_text().splitlines()
    assert lines == [
        "# gpu: none",
        "m,n,k,rank,what,ms,tflops,watts,mhz,millijoules",
        "4608,12288,3072,64,select,0.025,nan,512.5,1980,12.812",
    ]
