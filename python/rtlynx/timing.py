"""Time GPU functions against each other in one run: interleaved, with a cold L2, medians of CUDA events."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping

import torch

# More than any GPU's L2, so that writing it evicts what the last call left there; and so much more that the host has prepared the call,
# a tenth of a millisecond for a layer of two ops, before the device is done.
_FLUSH_BYTES = 1 << 30


def time_interleaved(functions: Mapping[str, Callable[[], object]], repeats: int = 30, warm_up: int = 5) -> dict[str, float]:
    """Median milliseconds of every function on the current device.

    The functions take turns, so that a clock that sags under load sags for all of them, in another order every time, so that none always
    follows one that heats the GPU. Before each call the L2 cache is overwritten, which
    also keeps the device busy while the host prepares the launch: what is timed is the device, not Python.

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
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            functions[name]()
            end.record()
            end.synchronize()
            if turn >= warm_up:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}
