"""One run over a set of layers: every layer against its peers, then the limits of the GPU while it is as hot as it was for the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from rtlynx import _core
from rtlynx.bench import cutlass_build
from rtlynx.bench.layer import measure_layer
from rtlynx.bench.probe import measure_limits
from rtlynx.layer_times import LayerTimes


@dataclass(frozen=True)
class Run:
    """What a run measured.

    Attributes:
        rows: One for each layer.
        notes: The limits, which CUTLASS ran, and the first layer that each absent peer did not run: `key: value` lines for a result file.
    """

    rows: tuple[LayerTimes, ...]
    notes: tuple[str, ...]


@contextmanager
def kernels_of_every_gpu() -> Iterator[None]:
    """Inside the block the kernels run that every GPU from sm_80 on has, whatever this one could."""
    before = _core.use_portable_kernels(True)
    try:
        yield
    finally:
        _core.use_portable_kernels(before)


def run_layers(shapes: Sequence[tuple[int, int, int]], rank: int, repeats: int, peers: bool) -> Run:
    """Measure layers of (M, N, K) on the current device."""
    rows = []
    missing: dict[str, str] = {}
    with tqdm(shapes, desc="layers", unit="layer") as progress:
        for m, n, k in progress:
            times, absent = measure_layer(m, n, k, rank, repeats, peers)
            rows.append(times)
            for peer, reason in absent.items():
                missing.setdefault(peer, f"without {peer}: first at M {m}, N {n}, K {k}: {reason}")
    versions = [cutlass_build.described()] if any(row.cutlass_kernel for row in rows) else []
    return Run(tuple(rows), (*measure_limits(repeats).header(), *versions, *missing.values()))
