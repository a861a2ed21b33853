"""The probes multiply what they say they multiply: a limit measured with a wrong product would be no limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtlynx import reference
from rtlynx.bench.probe import COLUMNS, OUTPUTS, PROBES, ROWS, THREADS, Probe, measure_limits

pytestmark = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0) if torch.cuda.is_available() else False, reason="Hopper only")

STEPS = 3


def unswizzled(stored: Tensor) -> Tensor:
    """Rows of 128 or 64 bytes as the tensor cores see them: 16-byte chunk c of row r lies at c ^ (r % 8), or at c ^ (r // 2 % 4)."""
    rows, columns = stored.shape
    chunks = torch.arange(columns // 8, device=stored.device)
    row = torch.arange(rows, device=stored.device)[:, None]
    places = chunks ^ (row % 8 if columns == 64 else row // 2 % 4)
    return stored.view(rows, -1, 8).gather(1, places[..., None].expand(-1, -1, 8)).view(rows, columns)


def expected_sums(probe: Probe) -> Tensor:
    """The sum over the accumulators of every thread of a block."""
    a, w = probe.data[: -OUTPUTS * COLUMNS].view(ROWS, -1), unswizzled(probe.data[-OUTPUTS * COLUMNS :].view(OUTPUTS, COLUMNS))
    if probe.name.endswith("ss"):
        a = unswizzled(a)
    if probe.name.startswith("sparse"):
        a = reference.decompress(a, probe.metadata)
    product = STEPS * a.double() @ w.double().T
    # (warpgroup, m64 tile, warp, half, g) x (n8 tile, q, pair): a thread is a warpgroup, warp, g and q
    return product.view(2, 2, 4, 2, 8, 24, 4, 2).sum((1, 3, 5, 7)).view(THREADS)


@pytest.mark.parametrize("name", PROBES)
def test_every_multiprocessor_computes_the_product(name: str) -> None:
    probe = Probe(name, torch.device("cuda", torch.cuda.current_device()))
    sums, expected = probe.run(STEPS).double(), expected_sums(probe)
    assert sums.shape == (torch.cuda.get_device_properties(0).multi_processor_count, THREADS)
    # Sums of 192 float32 accumulators of 3 · 64 products each: rounding is some 1e-6 of them.
    assert ((sums - expected).norm(dim=1) / expected.norm()).max() < 1e-4
    assert probe.clocks > 0


def test_the_limits_are_all_there() -> None:
    limits = measure_limits(repeats=1)
    assert set(limits.tflops) == {*PROBES, "main_loop"} and set(limits.cycles) == set(limits.mhz) == set(PROBES)
    assert all(value > 0 for value in (*limits.tflops.values(), *limits.cycles.values(), *limits.mhz.values(), limits.copy_gb_s))
