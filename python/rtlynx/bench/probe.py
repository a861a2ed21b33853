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
from rtlynx.errors import InvalidArgumentError
from rtlynx.timing import time_interleaved

PROBES = ("dense_ss", "dense_rs", "sparse_ss", "sparse_rs")
"""wgmma m64n192k16 and wgmma.sp m64n192k32, A from shared memory (ss) or from registers (rs)."""
ROWS, OUTPUTS, COLUMNS, THREADS = 256, 192, 64, 256
"""A block's product in one step, and its threads: cuda/kernels/probe_sm90.cu."""

_STEPS = 2000  # 1 to 2 ms on an H200
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
    def size(self) -> tuple[int, int, int]:
        """M, N and K of what `run` multiplies: every block its own rows, the same columns of its operands again and again."""
        return ROWS * self.sums.shape[0], OUTPUTS, COLUMNS * _STEPS

    @property
    def flop(self) -> float:
        """Of `run`, counting 2·M·N·K whatever is skipped."""
        return 2.0 * math.prod(self.size)


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


class MainLoop:
    """The sparse GEMM on one full wave, with a K so long that filling the pipeline and storing the output are 1 % of the time."""

    m, n, k = 12 * 256, 11 * 192, 32768  # 132 tiles, one for each multiprocessor of an H200

    def __init__(self, device: torch.device) -> None:
        self.sparse = ops.sparsify(torch.randn(self.m, self.k, device=device, dtype=torch.bfloat16))
        self.weight = torch.randn(self.n, self.k, device=device, dtype=torch.bfloat16) / math.sqrt(self.k)

    def run(self) -> Tensor:
        """Y, ``(m, n)``."""
        return ops.sparse_linear(self.sparse.values, self.sparse.metadata, self.weight)

    @property
    def flop(self) -> float:
        """Of `run`: 2·M·N·K."""
        return 2.0 * self.m * self.n * self.k


def probes(device: torch.device) -> list[Probe]:
    """All of them; none on other architectures, which have other instructions, nor where the kernels for every GPU are to run."""
    found = [Probe(name, device) for name in PROBES]
    try:
        found[0].run(steps=1)
    except InvalidArgumentError:
        return []
    return found


def measure_limits(repeats: int = 30) -> Limits:
    """Measure all limits against each other on the current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.empty(_COPY_BYTES, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    instructions, main_loop = probes(device), MainLoop(device)
    functions: dict[str, Callable[[], object]] = {probe.name: probe.run for probe in instructions}
    functions["main_loop"] = main_loop.run
    functions["copy"] = lambda: target.copy_(source)
    ms = time_interleaved(functions, repeats)
    flop = {probe.name: probe.flop for probe in instructions} | {"main_loop": main_loop.flop}
    return Limits(
        tflops={name: value * 1e-9 / ms[name] for name, value in flop.items()},
        cycles={probe.name: probe.clocks / (_STEPS * probe.instructions) for probe in instructions},
        mhz={probe.name: probe.clocks * 1e-3 / ms[probe.name] for probe in instructions},
        copy_gb_s=2e-6 * _COPY_BYTES / ms["copy"],
    )
