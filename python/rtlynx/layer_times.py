"""The table of measured layers, ``layer.csv``: what `rtlynx bench gemm` writes, and `rtlynx.search` takes times from."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class LayerTimes:
    """One row of layer.csv. Times are milliseconds; TFLOP/s count 2·M·N·K whatever was skipped; NaN where a peer does not run the layer.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        rank: Of the branch.
        dense_ms: ``F.linear`` with bias, bfloat16: cuBLAS.
        gemm_ms: `rtlynx.ops.sparse_linear` with row scale, branch and bias.
        select_ms: `rtlynx.ops.sparsify` with norm compensation and branch.
        layer_ms: Both, as a layer runs them.
        gemm_tflops: Of `gemm_ms`.
        speedup: `dense_ms` over `layer_ms`.
        fp8_ms: ``torch._scaled_mm`` with bias on e4m3 operands that are already quantised, a scale per row.
        copy_ms: A device copy of as many bytes as selection has to move, the floor of `select_ms`.
        cusparselt_mm_ms: ``torch.mm`` of a compressed activation and the weight, without bias; torch plans anew in every call.
        cusparselt_compress_ms: Compressing an activation that is 2:4 already; finding its zeros is not counted.
        cutlass_mm_ms: CUTLASS's sparse GEMM on an activation that is compressed already, without bias: the fastest of its kernels.
        cutlass_kernel: That one: tile, cluster, schedule and swizzle.
        fused_ms: The one-kernel path, a whole layer like `layer_ms`.
        kernel: Of `gemm_ms`.
        gemm_e4m3_ms: Like `gemm_ms`, with e4m3 operands (``precision="fp8"``); NaN where the GPU has no kernels for it.
        select_e4m3_ms: Like `select_ms`, with e4m3 values.
        layer_e4m3_ms: Both.
        speedup_e4m3: `dense_ms` over `layer_e4m3_ms`.
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
    fp8_ms: float = math.nan
    copy_ms: float = math.nan
    cusparselt_mm_ms: float = math.nan
    cusparselt_compress_ms: float = math.nan
    cutlass_mm_ms: float = math.nan
    cutlass_kernel: str = ""
    fused_ms: float = math.nan
    kernel: str = ""
    gemm_e4m3_ms: float = math.nan
    select_e4m3_ms: float = math.nan
    layer_e4m3_ms: float = math.nan
    speedup_e4m3: float = math.nan


def read_csv(path: Path) -> tuple[dict[str, str], list[LayerTimes]]:
    """The header, by what stands before the first colon of a line, and the rows. Columns that a file of an older version lacks are NaN."""
    lines = path.read_text().splitlines()
    notes = (line[1:].partition(":") for line in lines if line.startswith("#"))
    header = {key.strip(): value.strip() for key, colon, value in notes if colon}
    convert = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(LayerTimes)}
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    return header, [LayerTimes(**{key: convert[key](value) for key, value in row.items()}) for row in reader]
