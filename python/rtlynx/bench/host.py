"""What a call of a layer costs the host, eager and in compiled code; of an eager one also in parts: Python, allocations, launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import launch, layer_call
from rtlynx.config import SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear
from rtlynx.sharing import InputGroup

METHOD = "host time in us: the least mean of 100 calls, without gradients; a part is timed alone, or is what is left of the call around it"
"""How it is measured, for the header of a result file."""
WHOLE, LOOP = "whole", "loop"

_CALLS = 100
"""Calls timed together: far fewer than the driver queues before it makes the host wait."""
_CHAIN = 20
"""Layers of one compiled graph, so that what every graph costs by itself counts little."""


@dataclass(frozen=True)
class HostTime:
    """One row of host.csv.

    Attributes:
        call: Of which layer.
        part: ``"whole"``, or a part of it; all parts of a call sum to the whole.
        us: Microseconds. Of a part that is a difference they may be negative.
    """

    call: str
    part: str
    us: float


@dataclass(frozen=True)
class Timed:
    """A call, and the calls within it that can be timed alone.

    Attributes:
        part: What of it is not within those.
        call: To be timed.
        within: What it calls.
    """

    part: str
    call: Callable[[], object]
    within: tuple[Timed, ...] = ()


@torch.no_grad()
def host_times(rank: int, repeats: int) -> list[HostTime]:
    """Microseconds of host time of one call without gradients: of a dense layer, and of a sparse one alone and in a group of three.

    By parts, eager: of a dense layer, of a sparse one alone, and of one that computes densely since its tokens are too few, on a GPU that
    has such layers. Whole: of a sparse one with what is fused. Compiled: of a layer of a chain of them in one graph, all of it divided by
    their number.

    Raises:
        InvalidArgumentError: With this torch eager calls do not take the short way.
    """
    k = n = 512  # so small that the device is never what the host waits for
    dense = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    layers = [SparseLinear.from_linear(dense, SparsityConfig(small_m="sparse")) for _ in range(3)]
    few = SparseLinear.from_linear(dense, SparsityConfig(small_m="dense"))
    down, up = (torch.randn(k, rank), torch.randn(n, rank)) if rank else (None, None)
    for layer in (*layers, few):
        layer.set_compensation(down, up)
    alone = layers[0]
    x = torch.randn(1, 256, k, device="cuda", dtype=torch.bfloat16)
    alone(x)  # the first call checks, and is remembered
    eager = {"dense": dense_call(dense, x), "sparse": sparse_call(alone, x)}
    if few.is_dense_now(x.shape[:-1].numel(), x.device):
        eager["sparse, too few tokens"] = dense_call(few, x)
    found = [HostTime(call, *part) for call, timed in eager.items() for part in parts(timed, lambda f: _time(f, repeats)).items()]
    residual, gate = torch.randn_like(x), torch.randn_like(x[:, 0])
    us = _time(lambda: alone.forward_activated(x, "gelu_tanh", residual=residual, residual_gate=gate), repeats)
    found.append(HostTime("sparse, GELU before and gated sum after", WHOLE, us))

    for name, link in (("dense, compiled", dense), ("sparse, compiled", alone)):
        chain = torch.compile(nn.Sequential(*[link] * _CHAIN), fullgraph=True)
        us = _time(lambda chain=chain: chain(x), repeats, _CALLS // _CHAIN) / _CHAIN  # type: ignore[misc]
        found.append(HostTime(name, WHOLE, us))

    group = InputGroup()
    for layer in layers:
        group.join(layer)
    group.tie()
    us = _time(lambda: [layer(x) for layer in layers], repeats) / len(layers)
    return [*found, HostTime("sparse, shared by three", WHOLE, us)]


def dense_call(layer: nn.Linear, x: Tensor) -> Timed:
    """A call of a layer that multiplies densely: what is done before ``F.linear``, and that, which is torch's down to the launch."""
    weight, bias = layer.weight, layer.bias
    linear = Timed("F.linear", lambda: F.linear(x, weight, bias))
    return Timed("nn.Module.__call__", lambda: layer(x), (Timed("forward", lambda: layer.forward(x), (linear,)),))


def sparse_call(layer: SparseLinear, x: Tensor) -> Timed:
    """A call of a layer that has been called before: see `rtlynx.layer_call`, whose steps these are.

    Raises:
        InvalidArgumentError: The call before was not remembered.
    """
    call = layer._call
    if not isinstance(call, layer_call.LayerCall):
        raise InvalidArgumentError("bench host", "torch", torch.__version__, "one whose dispatch keys `rtlynx.direct` can read")
    core, m, n = call._core, x.shape[:-1].numel(), layer.out_features
    stream, output, workspace = launch.stream(x.get_device()), x.new_empty((*x.shape[:-1], n)), call._workspace(x, m)
    both = (
        Timed("selection", lambda: core.select(stream, m, x.data_ptr(), workspace.data_ptr())),
        Timed("product", lambda: core.multiply(stream, m, workspace.data_ptr(), output.data_ptr())),
    )
    steps = (
        Timed("comparing the layer", lambda: layer_call._read(layer) != call._read),
        Timed("allocations", lambda: (x.new_empty((*x.shape[:-1], n)), call._workspace(x, m))),
        Timed("one entry for both", lambda: core.run(stream, m, x.data_ptr(), workspace.data_ptr(), output.data_ptr()), both),
    )
    forward = Timed("forward", lambda: layer.forward(x), (Timed("other checks", lambda: call(layer, x), steps),))
    return Timed("nn.Module.__call__", lambda: layer(x), (forward,))


def parts(timed: Timed, clock: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Part → microseconds, the whole call first.

    The parts sum to the whole: each call counts without those within it, and without the loop it was timed in, which is a part of its own.

    Args:
        timed: The whole call.
        clock: Microseconds of a call in a loop of them.
    """
    loop = clock(lambda: None)
    found: dict[str, float] = {}

    def alone(timed: Timed) -> float:
        found[timed.part] = us = clock(timed.call) - loop
        for call in timed.within:
            found[timed.part] -= alone(call)
        return us

    return {WHOLE: alone(timed) + loop, **found, LOOP: loop}


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
