"""What follows a product: in the product's kernel, and as passes of their own behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx import ops
from rtlynx.fp8 import missing_kernels, quantize_weight
from rtlynx.reference import E4M3
from rtlynx.timing import time_interleaved


@dataclass(frozen=True)
class After:
    """A product of a real model, M tokens of one sample, and whether GELU follows it or a gate and a residual."""

    m: int
    n: int
    k: int
    gelu: bool = False


AFTER: tuple[After, ...] = (
    After(4096, 3072, 3072),  # FLUX.1, Qwen-Image: output of the attention, image stream
    After(4096, 3072, 12288),  # of the feed-forward
    After(512, 3072, 12288),  # FLUX.1: of the feed-forward, text stream
    After(4608, 3072, 15360),  # FLUX.1: proj_out of a single-stream block
    After(4608, 6144, 24576),  # FLUX.2: to_out of a single-stream block
    After(4096, 12288, 3072, gelu=True),  # FLUX.1, Qwen-Image: the first layer of the feed-forward
    After(4608, 12288, 3072, gelu=True),  # FLUX.1: proj_mlp of a single-stream block
)


@dataclass(frozen=True)
class EpilogueTimes:
    """One row of epilogue.csv. Times are milliseconds, all with row scale, branch and bias.

    Attributes:
        m: Tokens.
        n: Output channels.
        k: Input channels.
        rank: Of the branch.
        after: "gelu_tanh", or "gated" for ``residual + gate · y``.
        operands: "bf16" or "e4m3".
        product_ms: The product and nothing after it.
        fused_ms: `rtlynx.ops.sparse_linear` with the epilogue.
        eager_ms: The product, then what follows by torch, operation by operation, as diffusers has it.
        compiled_ms: The same with what follows compiled to one kernel.
    """

    m: int
    n: int
    k: int
    rank: int
    after: str
    operands: str
    product_ms: float
    fused_ms: float
    eager_ms: float
    compiled_ms: float


@torch.no_grad()
def measure_epilogue(after: After, rank: int, repeats: int = 30) -> list[EpilogueTimes]:
    """Time one of `AFTER` on the current device, with every type of operands that its kernels multiply."""
    torch.manual_seed(after.m + after.n + after.k)
    m, n, k = after.m, after.n, after.k
    x, dense, bias = _random(m, k), _random(n, k) / math.sqrt(k), _random(n)
    down, up = (_random(k, rank) / math.sqrt(k), _random(n, rank)) if rank else (None, None)
    residual, gate = (None, None) if after.gelu else (_random(m, n), _random(1, n))
    made = torch.compile(_steps, fullgraph=True)
    rows = []
    for name, values_dtype in (("bf16", None), ("e4m3", E4M3)):
        if values_dtype is not None and missing_kernels(x.device):
            continue
        weight, scale = (dense, None) if values_dtype is None else quantize_weight(dense)
        sparse = ops.sparsify(x, comp_down=down, values_dtype=values_dtype)
        branch, out_dtype = sparse.branch if rank else None, None if scale is None else x.dtype
        product = functools.partial(
            ops.sparse_linear, sparse.values, sparse.metadata, weight, sparse.row_scale, branch, up, bias, scale, out_dtype
        )
        times = time_interleaved(_calls(product, made, residual, gate), repeats)
        what = "gelu_tanh" if after.gelu else "gated"
        rows.append(EpilogueTimes(m, n, k, rank, what, name, **{f"{call}_ms": ms for call, ms in times.items()}))
    return rows


def _calls(
    product: Callable[..., Tensor], made: Callable[..., Tensor], residual: Tensor | None, gate: Tensor | None
) -> dict[str, Callable[[], object]]:
    """What each column has the time of; ``made`` is `_steps`, compiled."""
    return {
        "product": product,
        "fused": lambda: product(activation="gelu_tanh" if residual is None else "none", residual=residual, gate=gate),
        "eager": lambda: _steps(product(), residual, gate),
        "compiled": lambda: made(product(), residual, gate),
    }


def _steps(y: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """As diffusers has it, one sample."""
    if residual is None or gate is None:
        return F.gelu(y, approximate="tanh")
    return residual + gate * y


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
