"""What an activation, a norm or a permutation before a selection costs: in the selection's kernel, and as a pass of its own before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx import ops
from rtlynx.fp8 import missing_kernels
from rtlynx.reference import E4M3, K_MULTIPLE, Activation, activated, permutation_of
from rtlynx.row_stats import row_stats
from rtlynx.timing import time_interleaved


@dataclass(frozen=True)
class Before:
    """A selection of a real model from M tokens of K channels; before it, an activation of all but the first `head_k`, or a permutation."""

    m: int
    k: int
    head_k: int
    activation: Activation
    gathered: bool = False


BEFORE: tuple[Before, ...] = (
    Before(512, 12288, 0, "gelu_tanh"),  # FLUX.1: feed-forward of the text stream
    Before(4096, 12288, 0, "gelu_tanh"),  # FLUX.1, Qwen-Image: of the image stream
    Before(4608, 15360, 3072, "gelu_tanh"),  # FLUX.1: proj_out of a single-stream block, behind the attention
    Before(4224, 10240, 0, "silu_gate"),  # Z-Image
    Before(4608, 24576, 6144, "silu_gate"),  # FLUX.2: to_out of a single-stream block, behind the attention
    Before(4608, 3072, 0, "none", gathered=True),  # FLUX.1: attention of a single-stream block
    Before(4608, 12288, 0, "none", gathered=True),  # feed-forward
    Before(4608, 15360, 0, "none", gathered=True),  # proj_out
)


@dataclass(frozen=True)
class Norm:
    """A selection of a real model from the norm of M tokens of K channels, of one sample."""

    m: int
    k: int
    norm: Literal["layer_norm", "rms_norm"]


NORMS: tuple[Norm, ...] = (
    Norm(4096, 3072, "layer_norm"),  # FLUX.1, Qwen-Image: the image stream, modulated
    Norm(4608, 3072, "layer_norm"),  # FLUX.1: a single-stream block
    Norm(4224, 3840, "rms_norm"),  # Z-Image
)


@dataclass(frozen=True)
class ActivationTimes:
    """One row of activation.csv. Times are milliseconds, all with norm compensation and a branch.

    Attributes:
        m: Tokens.
        k: Channels of X.
        head_k: How many of them come ahead of the activation.
        activation: See `rtlynx.reference.activated`; or which of `NORMS`.
        gathered: Whether channels are gathered by a permutation.
        rank: Of the branch.
        values: "bf16" or "e4m3".
        select_ms: Selection from an X that is in memory.
        fused_ms: `rtlynx.ops.sparsify` with the activation and the places; with the norm, and `rtlynx.row_stats.row_stats` before it.
        eager_ms: The activation and the concatenation by torch, as diffusers has them, and ``index_select``, then selection; the norm by
            torch's one kernel.
        compiled_ms: The same with all before selection compiled.
        copy_ms: A device copy of as many bytes as `fused_ms` has to move.
    """

    m: int
    k: int
    head_k: int
    activation: str
    gathered: bool
    rank: int
    values: str
    select_ms: float
    fused_ms: float
    eager_ms: float
    compiled_ms: float
    copy_ms: float


@torch.no_grad()
def measure_activation(before: Before, rank: int, repeats: int = 30) -> list[ActivationTimes]:
    """Time one of `BEFORE` on the current device, with every type of values that its kernels store."""
    torch.manual_seed(before.m + before.k)
    m, k, head_k, activation = before.m, before.k, before.head_k, before.activation
    x = _random(m, k - head_k)
    gate = _random(m, k - head_k) if activation == "silu_gate" else None
    head = _random(m, head_k) if head_k else None
    down = _random(k, rank) / math.sqrt(k) if rank else None
    places = torch.rand(k // K_MULTIPLE, K_MULTIPLE, device="cuda").argsort(1).flatten().byte() if before.gathered else None
    permutation = None if places is None else permutation_of(places)
    whole = _made(activated(x, activation, gate, head), permutation)
    made = torch.compile(lambda *what: _made(activated(*what), permutation), fullgraph=True)
    rows = []
    for name, values_dtype in (("bf16", None), ("e4m3", E4M3)):
        if values_dtype is not None and missing_kernels(x.device):
            continue

        def select(
            x: Tensor,
            activation: Activation = "none",
            gate: Tensor | None = None,
            head: Tensor | None = None,
            places: Tensor | None = None,
            values_dtype: torch.dtype | None = values_dtype,
        ) -> object:
            return ops.sparsify(x, comp_down=down, values_dtype=values_dtype, activation=activation, gate=gate, head=head, places=places)

        moved = (whole.numel() + (0 if gate is None else gate.numel())) * 2 + whole.numel() // 2 * (2 if values_dtype is None else 1)
        moved += whole.numel() // 8 + 2 * rank * (m + k)
        calls: dict[str, Callable[[], object]] = {
            "select": lambda: select(whole),
            "fused": lambda: select(x, activation, gate, head, places),
            "eager": lambda: select(_made(_as_diffusers(x, activation, gate, head), permutation)),
            "compiled": lambda: select(made(x, activation, gate, head)),
            "copy": _copy_that_moves(moved),
        }
        times = time_interleaved(calls, repeats)
        milliseconds = {f"{what}_ms": ms for what, ms in times.items()}
        rows.append(ActivationTimes(m, k, head_k, activation, before.gathered, rank, name, **milliseconds))
    return rows


@torch.no_grad()
def measure_norm(before: Norm, rank: int, repeats: int = 30) -> list[ActivationTimes]:
    """Time one of `NORMS` on the current device, with every type of values that its kernels store."""
    torch.manual_seed(before.m + before.k)
    m, k, centered = before.m, before.k, before.norm == "layer_norm"
    h, weight = _random(m, k), 1 + _random(k) / 4
    bias = _random(k) / 4 if centered else None
    down = _random(k, rank) / math.sqrt(k) if rank else None

    def norm(h: Tensor) -> Tensor:
        if bias is None:
            return F.rms_norm(h, (k,), weight, 1e-6)
        return F.layer_norm(h, (k,), weight, bias, 1e-6)

    whole, made = norm(h), torch.compile(norm, fullgraph=True)
    rows = []
    for name, values_dtype in (("bf16", None), ("e4m3", E4M3)):
        if values_dtype is not None and missing_kernels(h.device):
            continue

        def select(x: Tensor, *norm: Tensor | None, values_dtype: torch.dtype | None = values_dtype) -> object:
            stats, of_columns, added = norm or (None, None, None)
            return ops.sparsify(x, comp_down=down, values_dtype=values_dtype, norm_stats=stats, norm_weight=of_columns, norm_bias=added)

        moved = 2 * h.numel() * 2 + h.numel() // 2 * (2 if values_dtype is None else 1) + h.numel() // 8 + 2 * rank * (m + k)
        calls: dict[str, Callable[[], object]] = {
            "select": lambda: select(whole),
            "fused": lambda: select(h, row_stats(h, centered), weight, bias),
            "eager": lambda: select(norm(h)),
            "compiled": lambda: select(made(h)),
            "copy": _copy_that_moves(moved),
        }
        times = time_interleaved(calls, repeats)
        rows.append(ActivationTimes(m, k, 0, before.norm, False, rank, name, **{f"{what}_ms": ms for what, ms in times.items()}))
    return rows


def _made(whole: Tensor, permutation: Tensor | None) -> Tensor:
    return whole if permutation is None else whole.index_select(1, permutation)


def _as_diffusers(x: Tensor, activation: Activation, gate: Tensor | None, head: Tensor | None) -> Tensor:
    """`activated` in the model's dtype, operation by operation."""
    if gate is not None:
        x = torch.nn.functional.silu(x) * gate
    elif activation != "none":
        x = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x if head is None else torch.cat([head, x], 1)


def _copy_that_moves(bytes: int) -> Callable[[], object]:
    source, target = torch.empty(2, bytes // 2, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(source)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
