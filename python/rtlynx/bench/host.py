"""What a call of a layer costs the host, eager and in compiled code: Python, checks, allocations, launches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from rtlynx.config import SparsityConfig
from rtlynx.linear import SparseLinear
from rtlynx.sharing import InputGroup

_CALLS = 100
"""Calls timed together: far fewer than the driver queues before it makes the host wait."""
_CHAIN = 20
"""Layers of one compiled graph, so that what every graph costs by itself counts little."""


def host_times(rank: int, repeats: int) -> dict[str, float]:
    """Microseconds of host time of one call without gradients: of a dense layer, and of a sparse one alone and in a group of three.

    Compiled: of a layer of a chain of them in one graph, all of it divided by their number.
    """
    k = n = 512  # so small that the device is never what the host waits for
    dense = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    layers = [SparseLinear.from_linear(dense, SparsityConfig(small_m="sparse")) for _ in range(3)]
    down, up = (torch.randn(k, rank), torch.randn(n, rank)) if rank else (None, None)
    for layer in layers:
        layer.set_compensation(down, up)
    alone = layers[0]
    x = torch.randn(1, 256, k, device="cuda", dtype=torch.bfloat16)
    times = {"dense": _time(lambda: dense(x), repeats), "sparse": _time(lambda: alone(x), repeats)}
    for name, link in (("dense, compiled", dense), ("sparse, compiled", alone)):
        chain = torch.compile(nn.Sequential(*[link] * _CHAIN), fullgraph=True)
        times[name] = _time(lambda chain=chain: chain(x), repeats, _CALLS // _CHAIN) / _CHAIN  # type: ignore[misc]

    group = InputGroup()
    for layer in layers:
        group.join(layer)
    group.tie()
    return {**times, "sparse, shared by three": _time(lambda: [layer(x) for layer in layers], repeats) / len(layers)}


@torch.no_grad()
def _time(call: Callable[[], object], repeats: int, calls: int = _CALLS) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first loads what it needs
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6
