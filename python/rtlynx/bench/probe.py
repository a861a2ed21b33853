"""What this GPU gives at most, so that a figure can be held against it: tensor cores, the GEMM's main loop, a copy.

Measured like the kernels themselves and in the same run, because the clock follows the load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rtlynx import _core, ops
from rtlynx.timing import time_interleaved

PROBES = ("dense_ss", "dense_rs", "sparse_ss", "sparse_rs")
"""wgmma m64n192k16 and wgmma.sp m64n192k32, A from shared memory (ss) or from registers (rs)."""
ROWS, OUTPUTS, COLUMNS, THREADS = 256, 192, 64, 256
"""A block's product in one step, and its threads: cuda/kernels/probe_sm90.cu."""

_STEPS = 2000  # 1 to 2 ms on an H200
_ONE_WAVE = (12 * 256, 11 * 192)  # 132 tiles of the Hopper GEMM, one for each multiprocessor of an H200
_LONG_K = 32768  # filling the pipeline and storing the output are 1 % of the time
_COPY_BYTES = 1 << 30


class Probe:
    """One probe's operands on a GPU, ready to run. Random; `tests/gpu/test_probe.py` decodes them."""

    def __init__(self, name: str, device: torch.device) -> None:
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
        a_columns = COLUMNS // 2 if name.startswith("sparse") else COLUMNS
        self.name = name
        self.data = torch.randn(ROWS * a_columns + OUTPUTS * COLUMNS, device=device, dtype=torch.bfloat16)
        self.metadata = ops.sparsify(torch.randn(ROWS, COLUMNS, device=device, dtype=torch.bfloat16)).metadata
        self.sums = torch.empty(blocks, THREADS, device=device, dtype=torch.float32)
        self.cycles = torch.empty(blocks, THREADS, device=device, dtype=torch.int64)

    def run(self, steps: int = _STEPS) -> Tensor:
        """Multiply `steps` times on every multiprocessor; the sum of each thread's accumulators, ``(blocks, threads)``."""
        device = self.data.device
        _core.probe(
            device_index=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
            name=self.name,
            steps=steps,
            data=self.data.data_ptr(),
            metadata=self.metadata.data_ptr(),
            sums=self.sums.data_ptr(),
            cycles=self.cycles.data_ptr(),
        )
        return self.sums

    @property
    def clocks(self) -> int:
        """How long the slowest thread of the last run took."""
        return int(self.cycles.max())

    @property
    def instructions(self) -> int:
        """How many of them a multiprocessor runs in a step: 4 tiles of 64 rows, 32 or 16 columns at a time."""
        return ROWS // 64 * COLUMNS // (32 if self.name.startswith("sparse") else 16)

    @property
    def flop(self) -> float:
        """Of `run`, counting 2·M·N·K whatever is skipped."""
        return 2.0 * ROWS * OUTPUTS * COLUMNS * _STEPS * self.sums.shape[0]


@dataclass(frozen=True)
class Limits:
    """What one run found; NaN where this GPU has no such thing.

    Attributes:
        tflops: Of every probe, and ``main_loop``: the sparse GEMM on one full wave with a K so long that nothing but its main loop counts.
        cycles: Clocks a multiprocessor takes for one instruction, by probe.
        mhz: Its clock meanwhile, by probe.
        copy_gb_s: A device copy, bytes read and bytes written.
    """

    tflops: Mapping[str, float]
    cycles: Mapping[str, float]
    mhz: Mapping[str, float]
    copy_gb_s: float

    def header(self) -> list[str]:
        """As `key: value` lines for a result file."""
        lines = [f"limit {name}, TFLOP/s: {value:.0f}" for name, value in self.tflops.items()]
        lines += [f"clocks an instruction, and MHz, {name}: {self.cycles[name]:.1f}, {self.mhz[name]:.0f}" for name in self.cycles]
        return [*lines, f"limit copy, GB/s: {self.copy_gb_s:.0f}"]


def measure_limits(repeats: int = 30) -> Limits:
    """Measure all limits against each other on the current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    m, n = _ONE_WAVE
    sparse = ops.sparsify(torch.randn(m, _LONG_K, device=device, dtype=torch.bfloat16))
    weight = torch.randn(n, _LONG_K, device=device, dtype=torch.bfloat16) / math.sqrt(_LONG_K)
    source = torch.empty(_COPY_BYTES, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    # Other architectures have other instructions, and no probes yet.
    probes = [Probe(name, device) for name in PROBES] if torch.cuda.get_device_capability(device) == (9, 0) else []
    functions: dict[str, Callable[[], object]] = {probe.name: probe.run for probe in probes}
    functions["main_loop"] = lambda: ops.sparse_linear(sparse.values, sparse.metadata, weight)
    functions["copy"] = lambda: target.copy_(source)
    ms = time_interleaved(functions, repeats)
    flop = {probe.name: probe.flop for probe in probes} | {"main_loop": 2.0 * m * n * _LONG_K}
    return Limits(
        tflops={name: value * 1e-9 / ms[name] for name, value in flop.items()},
        cycles={probe.name: probe.clocks / (_STEPS * probe.instructions) for probe in probes},
        mhz={probe.name: probe.clocks * 1e-3 / ms[probe.name] for probe in probes},
        copy_gb_s=2e-6 * _COPY_BYTES / ms["copy"],
    )
