"""CUTLASS as a peer of the bench, without CUTLASS: what it says is missing, where it looks, what is compiled, what goes into a row."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rtlynx.bench import cutlass_build, layer, peers, run
from rtlynx.bench.peer import Operands, Unavailable
from rtlynx.bench.peers import fastest_kernels, prepare
from rtlynx.bench.probe import Limits

VERSION_H = """#define CUTLASS_MAJOR 4
#define CUTLASS_MINOR {minor}
#define CUTLASS_PATCH 0
#define CUTLASS_BUILD 0
"""
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
{act}
"""


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever this machine has, a test sees only what it makes itself."""
    for name in ("CUTLASS_PATH", "NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cutlass_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(cutlass_build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [])
    cutlass_build._compiled.cache_clear()
    yield
    cutlass_build._compiled.cache_clear()


def headers(root: Path, minor: int = 2) -> Path:
    version = root / "include" / "cutlass" / "version.h"
    version.parent.mkdir(parents=True, exist_ok=True)
    version.write_text(VERSION_H.format(minor=minor))
    return root


def fake_nvcc(path: Path, act: str = "echo library > $2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC.format(log=path.with_name("log"), act=act))
    path.chmod(0o755)
    return path


def compilations(nvcc: Path) -> int:
    log = nvcc.with_name("log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_without_a_hopper_gpu_the_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {"cutlass": peers.cutlass})
    x = torch.empty(1, 64)
    calls, missing = prepare(Operands(x, x, x, None, None, sparse=None))  # type: ignore[arg-type]
    assert not calls and missing == {"cutlass": "CUTLASS's sparse GEMM needs a GPU of compute capability 9.0"}


def test_headers_are_those_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(headers(tmp_path / "cutlass")))
    include = cutlass_build.include_folder()
    assert include == tmp_path / "cutlass" / "include" and cutlass_build.cutlass_version(include) == "4.2.0"


def test_headers_are_found_in_the_wheel_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    headers(tmp_path / "cutlass_library" / "source")
    (tmp_path / "cutlass_library" / "__init__.py").write_text("raise ImportError('networkx is not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert cutlass_build.include_folder() == tmp_path / "cutlass_library" / "source" / "include"


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="pip install nvidia-cutlass"):
        cutlass_build.library()
    cutlass_build._compiled.cache_clear()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"has no include/cutlass/version\.h"):
        cutlass_build.library()


def test_a_missing_or_broken_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTLASS_PATH", str(headers(tmp_path)))
    with pytest.raises(Unavailable, match="no nvcc: set NVCC or CUDA_HOME"):
        cutlass_build.library()
    cutlass_build._compiled.cache_clear()
    monkeypatch.setenv("NVCC", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="nowhere does not run"):
        cutlass_build.library()


def test_nvcc_is_searched_in_the_documented_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = fake_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    on_path, home, named = (fake_nvcc(tmp_path / name / "bin" / "nvcc") for name in ("path", "home", "named"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert cutlass_build.nvcc() == wheel
    monkeypatch.setattr(cutlass_build.shutil, "which", lambda name: str(on_path))
    assert cutlass_build.nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cutlass_build.nvcc() == home
    monkeypatch.setenv("NVCC", str(named))
    assert cutlass_build.nvcc() == named


def test_it_is_compiled_once_for_each_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nvcc = fake_nvcc(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("CUTLASS_PATH", str(headers(tmp_path / "cutlass")))
    first = cutlass_build.library()
    assert first.read_text() == "library\n" and first.parent == tmp_path / "cache" / "cutlass"
    assert "a few minutes" in caplog.text
    assert cutlass_build.described() == "CUTLASS: 4.2.0, nvcc 13.0.88"
    cutlass_build._compiled.cache_clear()
    assert cutlass_build.library() == first and compilations(nvcc) == 1
    headers(tmp_path / "cutlass", minor=7)
    cutlass_build._compiled.cache_clear()
    assert cutlass_build.library() != first and compilations(nvcc) == 2


def test_what_does_not_compile_is_tried_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "bin" / "nvcc", 'echo a part > $2; echo "sparse.cu(1): error: no such template" >&2; exit 2')
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("CUTLASS_PATH", str(headers(tmp_path)))
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"does not compile: sparse\.cu.*no such template"):
            cutlass_build.library()
    assert compilations(nvcc) == 1
    assert list((tmp_path / "cache" / "cutlass").iterdir()) == []


def test_the_fastest_kernel_of_a_column_counts() -> None:
    ms = {"dense": 3.0, "cutlass_mm:a": 2.0, "cutlass_mm:b": 1.0, "cutlass_mm:c": 1.5}
    assert fastest_kernels(ms) == ({"dense": 3.0, "cutlass_mm": 1.0}, {"cutlass_mm": "b"})


def measured(monkeypatch: pytest.MonkeyPatch, others: dict[str, float]) -> layer.LayerTimes:
    ms = {"dense": 3.0, "gemm": 2.0, "select": 0.5, "layer": 2.5, **others}
    monkeypatch.setattr(layer, "layer_calls", lambda *arguments: ({}, {}))
    monkeypatch.setattr(layer, "time_interleaved", lambda calls, repeats: ms)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(layer, "_core", type("core", (), {"gemm_kernel": staticmethod(lambda *arguments: "spmm")}))
    return layer.measure_layer(4096, 3072, 3072, 64)[0]


def test_its_time_and_kernel_go_into_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(monkeypatch, {"cutlass_mm:128x128": 2.2, "cutlass_mm:256x128": 2.1})
    assert (times.cutlass_mm_ms, times.cutlass_kernel, times.gemm_ms) == (2.1, "256x128", 2.0)


def test_without_it_the_row_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(monkeypatch, {})
    assert math.isnan(times.cutlass_mm_ms) and times.cutlass_kernel == ""


def test_the_notes_name_the_cutlass_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(monkeypatch, {})
    rows = iter([times, dataclasses.replace(times, cutlass_kernel="256x128")])
    monkeypatch.setattr(run, "measure_layer", lambda *arguments: (next(rows), {}))
    monkeypatch.setattr(run, "measure_limits", lambda repeats: Limits({}, {}, {}, 4000.0))
    monkeypatch.setattr(cutlass_build, "described", lambda: "CUTLASS: 4.2.0, nvcc 13.0.88")
    assert not any("CUTLASS" in note for note in run.run_layers([(1, 8, 64)], 0, 1, True).notes)
    assert "CUTLASS: 4.2.0, nvcc 13.0.88" in run.run_layers([(1, 8, 64)], 0, 1, True).notes
