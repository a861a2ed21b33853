"""The linear layer, whole and in parts, against its peers: `rtlynx bench gemm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx import _core, ops
from rtlynx.bench.peer import Operands
from rtlynx.bench.peers import fastest_kernels, prepare
from rtlynx.errors import DeviceError
from rtlynx.fp8 import quantize_weight
from rtlynx.layer_times import LayerTimes
from rtlynx.reference import E4M3
from rtlynx.timing import time_interleaved


def layer_calls(m: int, n: int, k: int, rank: int, peers: bool = True) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """One layer on random bfloat16 data on the current device.

    Returns the calls that layer.csv has times of, named as `rtlynx.bench.peers.Calls` are, and the peers that do not run the layer, each
    with why.
    """
    torch.manual_seed(m * n + k)
    x, weight, bias = _random(m, k), _random(n, k) / math.sqrt(k), _random(n)
    down, up = (_random(k, rank) / math.sqrt(k), _random(n, rank)) if rank else (None, None)
    sparse = ops.sparsify(x, comp_down=down)

    def gemm(s: ops.Sparsified = sparse) -> Tensor:
        return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch if rank else None, up, bias)

    moved = torch.empty(_selection_bytes(m, k, rank) // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(moved)
    others, missing = prepare(Operands(x, weight, bias, down, up, sparse)) if peers else ({}, {})
    try:
        in_fp8 = _in_fp8(x, weight, bias, down, up)
    except DeviceError:  # neither older GPUs nor the kernels for every GPU multiply it
        in_fp8 = {}
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.linear(x, weight, bias),
        "gemm": gemm,
        "select": lambda: ops.sparsify(x, comp_down=down),
        "layer": lambda: gemm(ops.sparsify(x, comp_down=down)),
        "copy": lambda: target.copy_(moved),
        **others,
        **in_fp8,
    }
    return calls, missing


def fastest_calls(calls: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The calls by column, where the fastest of several kernels of one product stands for them."""
    several = {name: call for name, call in calls.items() if ":" in name}
    _, kernels = fastest_kernels(time_interleaved(several, repeats=3, warm_up=1)) if several else ({}, {})
    single = {name: call for name, call in calls.items() if name not in several}
    return single | {column: several[f"{column}:{kernel}"] for column, kernel in kernels.items()}


def measure_layer(m: int, n: int, k: int, rank: int, repeats: int = 30, peers: bool = True) -> tuple[LayerTimes, dict[str, str]]:
    """Time one layer on random bfloat16 data on the current device; also the peers that do not run it, each with why."""
    calls, missing = layer_calls(m, n, k, rank, peers)
    ms, kernels = fastest_kernels(time_interleaved(calls, repeats))
    times = LayerTimes(
        m=m,
        n=n,
        k=k,
        rank=rank,
        gemm_tflops=2e-9 * m * n * k / ms["gemm"],
        speedup=ms["dense"] / ms["layer"],
        speedup_e4m3=ms["dense"] / ms.get("layer_e4m3", math.nan),
        kernel=_core.gemm_kernel(torch.cuda.current_device(), m, n, k, rank, "bfloat16"),
        cutlass_kernel=kernels.get("cutlass_mm", ""),
        **{f"{name}_ms": time for name, time in ms.items()},
    )
    return times, missing


def _in_fp8(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor | None, up: Tensor | None) -> dict[str, Callable[[], object]]:
    """The same parts of the layer with e4m3 operands."""
    quantised, scale = quantize_weight(weight)

    def select() -> ops.Sparsified:
        return ops.sparsify(x, comp_down=down, values_dtype=E4M3)

    def gemm(s: ops.Sparsified) -> Tensor:
        branch = None if up is None else s.branch
        return ops.sparse_linear(s.values, s.metadata, quantised, s.row_scale, branch, up, bias, scale, x.dtype)

    sparse = select()
    return {"gemm_e4m3": lambda: gemm(sparse), "select_e4m3": select, "layer_e4m3": lambda: gemm(select())}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _selection_bytes(m: int, k: int, rank: int) -> int:
    """What selection must read and write: X, half of it as values, 1 bit an element of metadata, the branch and its factor, the scales."""
    return 2 * m * k + m * k + m * k // 8 + 2 * rank * (m + k) + 4 * m
