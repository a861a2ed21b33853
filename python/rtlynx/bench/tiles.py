"""Every kernel of the sparse GEMM on the same products, and what dispatch estimates them by, fitted to their times.

Dispatch runs the kernel of least estimated time: so many waves of tiles, and a tile takes so long a pipeline stage and so long besides
(``crates/rtlynx-core/src/dispatch.rs``). The tile table, ``config/spmm.rs``, holds both for every tile. This is where they come from, and
what tells how good the choice is on another GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from rtlynx import launch, plans
from rtlynx.autotune import measure_kernels
from rtlynx.plans import Machine, Problem


@dataclass(frozen=True)
class KernelTime:
    """One row of tiles.csv: one kernel on one product.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        rank: Of the branch.
        dtype: As in `rtlynx.plans.Problem`.
        kernel: Its name.
        planned: Whether dispatch plans it.
        ms: Its median time.
    """

    m: int
    n: int
    k: int
    rank: int
    dtype: str
    kernel: str
    planned: bool
    ms: float

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Rows and columns of its output tiles, dense columns of a pipeline stage, stages."""
        found = re.search(r"_(\d+)x(\d+)x(\d+)_s(\d+)", self.kernel)
        if found is None:
            raise ValueError(f"{self.kernel} does not name its tile")
        rows, columns, step, stages = map(int, found.groups())
        return rows, columns, step, stages

    def work(self, sms: int) -> tuple[int, int]:
        """Pipeline stages and tiles of the busiest of so many multiprocessors."""
        rows, columns, step, _ = self.tile
        tiles = math.ceil(math.ceil(self.m / rows) * math.ceil(self.n / columns) / sms)
        return tiles * math.ceil(self.k / step), tiles


@dataclass(frozen=True)
class TileTimes:
    """A row of the tile table.

    Attributes:
        tile: ``rows x columns``.
        step_ns: Nanoseconds of a pipeline stage with 16-bit operands; NaN where none were measured.
        e4m3_step_ns: The same with operands of e4m3.
        tile_ns: Nanoseconds of a tile besides.
    """

    tile: str
    step_ns: float
    e4m3_step_ns: float
    tile_ns: float


_DTYPES = "bfloat16", "bfloat16_e4m3"


def kernel_times(layers: Sequence[tuple[int, int, int]], rank: int, repeats: int) -> list[KernelTime]:
    """Time all kernels written for the current GPU on products (M, N, K), with e4m3 operands too where it has kernels for them.

    Those of each product take turns.
    """
    core, index = launch.core(), torch.cuda.current_device()
    gpu = core.devices()[index]
    known = plans.load(Machine.of(core, gpu))
    arch = {"capability": gpu["capability"], "sms": gpu["sms"]}
    rows = []
    for m, n, k in tqdm(layers, desc="products", unit="product"):
        for problem in (Problem(m, n, k, rank, dtype) for dtype in _DTYPES):
            candidates = core.candidates(**arch, **asdict(problem))
            if not candidates:
                continue
            planned = core.plan_sparse_linear(**arch, **asdict(problem))
            kernels = [name for name in candidates if _family(name) == _family(planned)]
            times = measure_kernels(core, index, problem, kernels, known.get(problem), repeats)
            rows += [KernelTime(**asdict(problem), kernel=name, planned=name == planned, ms=ms) for name, ms in times.items()]
    return rows


def _family(kernel: str) -> str:
    return kernel.split("_")[1]


def fit_tiles(rows: Sequence[KernelTime], sms: int) -> list[TileTimes]:
    """The times that explain the rows best, by their relative errors; what a launch costs all kernels alike is fitted and left out."""
    import numpy as np
    from scipy.optimize import least_squares

    tiles = list(dict.fromkeys(row.tile[:2] for row in rows))
    # For every row the places of its three times among the unknowns, and how often each counts.
    work = np.array([row.work(sms) for row in rows], dtype=float)
    at = np.array([tiles.index(row.tile[:2]) for row in rows])
    e4m3 = np.array([row.dtype.endswith("e4m3") for row in rows])
    log_ns = np.log([row.ms * 1e6 for row in rows])

    def errors(unknown: Any) -> Any:
        launch_ns, times = unknown[0], unknown[1:].reshape(len(tiles), 3)
        step = np.where(e4m3, times[at, 1], times[at, 0])
        return np.log(launch_ns + work[:, 0] * step + work[:, 1] * times[at, 2]) - log_ns

    start = np.array([4000.0, *(time for bm, bn in tiles for time in (bm * bn / 70, bm * bn / 70, 3000.0))])
    solution = least_squares(errors, start, bounds=(1e-3, np.inf), x_scale=start, loss="soft_l1", f_scale=0.05)
    times = solution.x[1:].reshape(len(tiles), 3)
    for kind, place in ((False, 0), (True, 1)):
        measured = {row.tile[:2] for row in rows if row.dtype.endswith("e4m3") == kind}
        times[[tile not in measured for tile in tiles], place] = math.nan
    return [TileTimes(f"{bm}x{bn}", step, e4m3_step, rest) for (bm, bn), (step, e4m3_step, rest) in zip(tiles, times.tolist(), strict=True)]


def plan_losses(rows: Iterable[KernelTime]) -> dict[Problem, float]:
    """For every product by how much longer the planned kernel takes than the fastest: 0.02 for 2 %."""
    by_problem: dict[Problem, list[KernelTime]] = {}
    for row in rows:
        by_problem.setdefault(Problem(row.m, row.n, row.k, row.rank, row.dtype), []).append(row)
    return {
        problem: next(row.ms for row in group if row.planned) / min(row.ms for row in group) - 1 for problem, group in by_problem.items()
    }
