"""The linear layer, whole and in parts, against what torch offers: `rtlynx bench layer`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rtlynx import ops
from rtlynx.bench.timing import time_interleaved
from rtlynx.io import atomic_path


@dataclass(frozen=True)
class LayerTimes:
    """One row of layer.csv. Times are milliseconds; TFLOP/s count 2·M·N·K whatever was skipped.

    Attributes:
        dense_ms: ``F.linear`` with bias, bfloat16: cuBLAS.
        gemm_ms: `rtlynx.ops.sparse_linear` with row scale, branch and bias.
        select_ms: `rtlynx.ops.sparsify` with norm compensation and branch.
        layer_ms: Both, as a layer runs them.
        fp8_ms: ``torch._scaled_mm`` on e4m3 operands that are already quantised, a scale per row; NaN where torch has none.
        copy_ms: A device copy of as many bytes as selection has to move, the floor of `select_ms`.
    """

    m: int
    n: int
    k: int
    rank: int
    dense_ms: float
    gemm_ms: float
    select_ms: float
    layer_ms: float
    gemm_tflops: float
    speedup: float
    fp8_ms: float
    copy_ms: float


def measure_layer(m: int, n: int, k: int, rank: int, repeats: int = 30, bar: tqdm[None] | None = None) -> LayerTimes:
    """Time one layer on random bfloat16 data on the current device."""
    torch.manual_seed(m * n + k)
    x, weight, bias = _random(m, k), _random(n, k) / math.sqrt(k), _random(n)
    down, up = (_random(rank, k) / math.sqrt(k), _random(n, rank)) if rank else (None, None)
    sparse = ops.sparsify(x, comp_down=down)

    def gemm(s: ops.Sparsified = sparse) -> Tensor:
        return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch if rank else None, up, bias)

    moved = torch.empty(_selection_bytes(m, k, rank) // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(moved)
    functions: dict[str, Callable[[], object]] = {
        "dense": lambda: F.linear(x, weight, bias),
        "gemm": gemm,
        "select": lambda: ops.sparsify(x, comp_down=down),
        "layer": lambda: gemm(ops.sparsify(x, comp_down=down)),
        "copy": lambda: target.copy_(moved),
    }
    fp8 = _fp8(x, weight, bias)
    if fp8 is not None:
        functions["fp8"] = fp8
    ms = time_interleaved(functions, repeats, bar=bar)
    return LayerTimes(
        m=m,
        n=n,
        k=k,
        rank=rank,
        dense_ms=ms["dense"],
        gemm_ms=ms["gemm"],
        select_ms=ms["select"],
        layer_ms=ms["layer"],
        gemm_tflops=2e-9 * m * n * k / ms["gemm"],
        speedup=ms["dense"] / ms["layer"],
        fp8_ms=ms.get("fp8", math.nan),
        copy_ms=ms["copy"],
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _selection_bytes(m: int, k: int, rank: int) -> int:
    """What selection must read and write: X, half of it as values, 1 bit an element of metadata, the branch and its factor, the scales."""
    return 2 * m * k + m * k + m * k // 8 + 2 * rank * (m + k) + 4 * m


def _fp8(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object] | None:
    """cuBLAS on e4m3 with a scale per row, without the cost of quantising; None where the GPU or this shape has none."""

    def quantised(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        return (t / scale).to(torch.float8_e4m3fn), scale

    (x8, x_scale), (w8, w_scale) = quantised(x), quantised(weight)

    def run() -> Tensor:
        return torch._scaled_mm(x8, w8.T, x_scale, w_scale.T, bias, out_dtype=torch.bfloat16)

    try:
        run()
    except RuntimeError:
        return None
    return run


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[LayerTimes]) -> None:
    """Write rows under ``#`` header lines, whole or not at all."""
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in header)
    writer = csv.DictWriter(text, [field.name for field in fields(LayerTimes)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()})
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())
