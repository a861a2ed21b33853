"""What else computes such a layer: prepared, if it is there, as calls to be timed against ours. One function a peer."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rtlynx import reference
from rtlynx.bench import cutlass as _cutlass
from rtlynx.bench.peer import Calls, Operands, Unavailable
from rtlynx.errors import RTLynxError


def fp8(layer: Operands) -> Calls:
    """cuBLAS on e4m3 with a scale per row of x and of the weight, bias included. Quantising x is not."""

    def quantised(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        return (t / scale).to(torch.float8_e4m3fn), scale

    (x, x_scale), (weight, weight_scale) = quantised(layer.x), quantised(layer.weight)
    return {"fp8": lambda: torch._scaled_mm(x, weight.T, x_scale, weight_scale.T, layer.bias, out_dtype=torch.bfloat16)}


def cusparselt(layer: Operands) -> Calls:
    """cuSPARSELt as torch offers it, on an activation that is 2:4 already: its product, without bias, and its compression."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Compressed

    if not torch.backends.cusparselt.is_available():
        raise Unavailable("this torch comes without cuSPARSELt")
    pruned = reference.decompress(layer.sparse.values, layer.sparse.metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the interface may change
        compressed = Compressed.from_dense(pruned)
    return {
        "cusparselt_mm": lambda: torch.mm(compressed, layer.weight.T),
        "cusparselt_compress": lambda: Compressed.from_dense(pruned),
    }


def cutlass(layer: Operands) -> Calls:
    """CUTLASS's sparse GEMM, if it can be compiled here, on an activation that is 2:4 and compressed already: its product, without bias."""
    return _cutlass.calls(layer)


def fused(layer: Operands) -> Calls:
    """rtlynx's one-kernel path: selection inside the product, nothing compressed touches memory."""
    linear = importlib.import_module("rtlynx.fused").fused_linear
    return {"fused": lambda: linear(layer.x, layer.weight, comp_down=layer.comp_down, comp_up=layer.comp_up, bias=layer.bias)}


PEERS: dict[str, Callable[[Operands], Calls]] = {"fp8": fp8, "cusparselt": cusparselt, "cutlass": cutlass, "fused": fused}


def prepare(layer: Operands) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The calls of all peers that run this layer, each run once, and why the others do not."""
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            mine = peer(layer)
            for call in mine.values():
                call()
            torch.cuda.synchronize(layer.x.device)
        except (Unavailable, ImportError, AttributeError, RuntimeError, RTLynxError) as error:
            missing[name] = (str(error).splitlines() or [type(error).__name__])[0].strip()
        else:
            calls.update(mine)
    return calls, missing


def fastest_kernels(ms: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Times by column, where calls ``column:kernel`` become the least of their times; and column → kernel for those."""
    times: dict[str, float] = {}
    kernels: dict[str, str] = {}
    for call in sorted(ms, key=ms.__getitem__):
        column, _, kernel = call.partition(":")
        if column not in times:
            times[column] = ms[call]
            if kernel:
                kernels[column] = kernel
    return times, kernels
