"""What binds a kernel: how far it fills every unit of the GPU, by Nsight Compute, for the kernels of a layer and CUTLASS's beside them.

A program of its own runs under ``ncu`` (`python -m rtlynx.bench.profile`): it calls each of `WHAT` once between the profiler's start and
stop. ncu repeats each kernel until all its counters are read, with a cold L2, and leaves the clocks alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rtlynx.errors import RTLynxError

WHAT = ("gemm", "gemm_e4m3", "cutlass_mm", "select", "select_e4m3")
"""The calls of `rtlynx.bench.layer.layer_calls` that are profiled, each of one kernel; of several kernels the fastest."""

_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
_PEAK = ".avg.pct_of_peak_sustained_elapsed"
_LEAST_PERCENT = 10.0
"""Of its peak that a unit must reach to be worth a row."""


@dataclass(frozen=True)
class Utilisation:
    """One row of profile.csv.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        rank: Of the branch.
        what: A column of layer.csv without its ``_ms``.
        kernel: As ncu names it.
        metric: As ncu names it: percent of its peak over the time of the kernel, time, or clock.
        value: In `unit`.
        unit: As ncu names it.
    """

    m: int
    n: int
    k: int
    rank: int
    what: str
    kernel: str
    metric: str
    value: float
    unit: str


def profile(shapes: Sequence[tuple[int, int, int]], rank: int, ncu: str | None = None) -> list[Utilisation]:
    """Profile layers of (M, N, K).

    Args:
        shapes: Of the layers.
        rank: Of the branch.
        ncu: The program; by default the one on PATH.

    Raises:
        FileNotFoundError: There is no ncu.
        RTLynxError: It failed; the message ends with its output.
    """
    program = ncu or shutil.which("ncu")
    if program is None:
        raise FileNotFoundError("ncu (Nsight Compute) is not on PATH; it comes with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder, "calls.json")
        command = [program, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
        command += [option for section in _SECTIONS for option in ("--section", section)]
        command += [sys.executable, "-m", "rtlynx.bench.profile", str(calls), str(rank), *("x".join(map(str, shape)) for shape in shapes)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode or not calls.is_file():
            raise RTLynxError(f"bench profile: {program} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
        return _rows(done.stdout, json.loads(calls.read_text()), rank)


def _rows(output: str, calls: Sequence[tuple[int, int, int, str]], rank: int) -> list[Utilisation]:
    """Of ncu's raw page: after its messages a line of names, one of units, one a kernel."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    units, *kernels = list(csv.DictReader(lines[start:])) or [{}]
    if len(kernels) != len(calls):
        raise RTLynxError(f"bench profile: ncu saw {len(kernels)} kernels, expected one for each of {len(calls)} calls:\n{output[-2000:]}")
    return [
        Utilisation(m, n, k, rank, what, _short(kernel["Kernel Name"]), metric, value, units[metric])
        for (m, n, k, what), kernel in zip(calls, kernels, strict=True)
        for metric in kernel
        if (value := _value(kernel[metric])) is not None and _worth_a_row(metric, value)
    ]


def fullest(rows: Sequence[Utilisation], count: int = 4) -> list[dict[str, object]]:
    """Of every kernel the rows of the units that are fullest."""
    kernels: dict[tuple[int, int, int, str], list[Utilisation]] = {}
    for row in rows:
        if row.metric.endswith(_PEAK):
            kernels.setdefault((row.m, row.n, row.k, row.what), []).append(row)
    return [asdict(row) for mine in kernels.values() for row in sorted(mine, key=lambda row: -row.value)[:count]]


def _worth_a_row(metric: str, value: float) -> bool:
    whole = ("gpu__time_duration.sum", "gpc__cycles_elapsed.avg.per_second", "smsp__cycles_elapsed.avg.per_second")
    return metric in whole or (metric.endswith(_PEAK) and value >= _LEAST_PERCENT)


def _short(kernel: str) -> str:
    """Without arguments and template arguments, which fill a page."""
    return kernel.removeprefix("void ").partition("(")[0].partition("<")[0]


def _value(text: str | None) -> float | None:
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _run_calls(calls_file: str, rank: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    """What runs under ncu: every call once in its view, and a file that says which."""
    import torch

    from rtlynx.bench.layer import fastest_calls, layer_calls

    seen = []
    for m, n, k in shapes:
        calls = fastest_calls(layer_calls(m, n, k, rank)[0])
        for what in WHAT:
            if what not in calls:
                continue
            calls[what]()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            calls[what]()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            seen.append((m, n, k, what))
    Path(calls_file).write_text(json.dumps(seen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls_file", help="where to write which calls were profiled, as JSON")
    parser.add_argument("rank", type=int)
    parser.add_argument("shapes", nargs="+", help="MxNxK")
    given = parser.parse_args()
    _run_calls(given.calls_file, given.rank, [(m, n, k) for m, n, k in (map(int, shape.split("x")) for shape in given.shapes)])
