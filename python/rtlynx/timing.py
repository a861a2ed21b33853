"""Time GPU functions against each other in one run: interleaved, with a cold L2, medians of CUDA events."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping

import torch

# More than any GPU's L2, so that writing it evicts what the last call left there; and so much more that the host has usually prepared the
# call, a tenth of a millisecond for a layer of two ops, before the device is done.
_FLUSH_BYTES = 1 << 30
_MOST_FLUSHES = 16


def time_interleaved(functions: Mapping[str, Callable[[], object]], repeats: int = 30, warm_up: int = 5) -> dict[str, float]:
    """Median milliseconds of every function on the current device.

    The functions take turns, so that a clock that sags under load sags for all of them, in another order every time, so that none always
    follows one that heats the GPU. Before each call the L2 cache is overwritten, which
    also keeps the device busy while the host prepares the launch: what is timed is the device, not Python. A call that the host prepared
    more slowly, as where others use it too, is timed again behind more writing.

    Args:
        functions: Named calls that put work on torch's current stream.
        repeats: Timed calls of each.
        warm_up: Calls of each before that.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffle = random.Random(0).shuffle
    for turn in range(warm_up + repeats):
        shuffle(order)
        for name in order:
            ms = _time_behind_writes(functions[name], flush)
            if turn >= warm_up:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def _time_behind_writes(function: Callable[[], object], flush: torch.Tensor) -> float:
    """Milliseconds of one call that the device finds waiting when it has overwritten its L2, if any amount of that makes it wait."""
    flushes = 1
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(flushes):
            flush.zero_()
        start.record()
        function()
        end.record()
        host_was_late = start.query()  # the device may have waited for it then
        end.synchronize()
        if not host_was_late or flushes == _MOST_FLUSHES:
            return float(start.elapsed_time(end))
        flushes *= 2
