"""What a product costs in energy: the GEMMs of a layer, each alone and without a pause, until the GPU has settled at its power limit.

The medians of `rtlynx.bench.layer` come from short bursts. Inside a model kernels follow each other, the GPU reaches its power limit, and
the clock falls to what the limit allows: then the faster kernel is the one that needs less energy. Power and clock are read through NVML.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rtlynx.bench.layer import fastest_calls, layer_calls
from rtlynx.bench.probe import MainLoop, probes

_CALLS = 20  # in a CUDA graph, so that no launch is waited for
_SETTLE_S = 0.5  # until power and clock are steady
_SAMPLE_S = 0.02
WHAT = ("dense", "fp8", "gemm", "cutlass_mm", "gemm_e4m3", "select", "select_e4m3")
"""The calls of `rtlynx.bench.layer.layer_calls` that are measured, of several kernels the fastest."""


@dataclass(frozen=True)
class Energy:
    """One row of energy.csv.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        rank: Of the branch.
        what: A column of layer.csv without its ``_ms``, or a limit of `rtlynx.bench.probe`.
        ms: Mean time of a call.
        tflops: 2·M·N·K over that, for products; NaN for selection.
        watts: Median power of the board.
        mhz: Median clock of the multiprocessors.
        millijoules: Of a call: `watts` times `ms`.
    """

    m: int
    n: int
    k: int
    rank: int
    what: str
    ms: float
    tflops: float
    watts: float
    mhz: float
    millijoules: float


def measure_energy(m: int, n: int, k: int, rank: int, seconds: float = 1.0) -> list[Energy]:
    """Run every call of one layer for `seconds` after it has settled.

    Raises:
        ModuleNotFoundError: ``nvidia-ml-py`` is not installed.
    """
    torch.cuda.power_draw()  # without NVML this raises before anything runs
    calls = fastest_calls(layer_calls(m, n, k, rank)[0])
    return [_measured(m, n, k, rank, what, calls[what], seconds) for what in WHAT if what in calls]


def measure_limits_energy(seconds: float = 1.0) -> list[Energy]:
    """The same of the probes and the sparse GEMM's main loop: what products cost where nothing else is done. M is that of all blocks."""
    device = torch.device("cuda", torch.cuda.current_device())
    loop = MainLoop(device)
    limits = [(*probe.size, probe.name, probe.run) for probe in probes(device)] + [(loop.m, loop.n, loop.k, "main_loop", loop.run)]
    return [_measured(m, n, k, 0, name, call, seconds) for m, n, k, name, call in limits]


def _measured(m: int, n: int, k: int, rank: int, what: str, call: Callable[[], object], seconds: float) -> Energy:
    ms, watts, mhz = _sustained(call, seconds)
    tflops = float("nan") if what.startswith("select") else 2e-9 * m * n * k / ms
    return Energy(m, n, k, rank, what, ms, tflops, watts, mhz, watts * ms)


def _sustained(call: Callable[[], object], seconds: float) -> tuple[float, float, float]:
    """(milliseconds a call, watts, MHz) once the GPU has settled."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    _repeat(graph, _SETTLE_S)
    watts: list[float] = []
    mhz: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_S):
            watts.append(torch.cuda.power_draw() / 1e3)
            mhz.append(float(torch.cuda.clock_rate()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        ms = _repeat(graph, seconds)
    finally:
        done.set()
        sampler.join()
    return ms, statistics.median(watts), statistics.median(mhz)


def _repeat(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    """Replay for so long; milliseconds of one call."""
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(5):
            graph.replay()
            calls += _CALLS
        torch.cuda.synchronize()
    return elapsed * 1e3 / calls
