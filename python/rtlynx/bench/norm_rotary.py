"""What a block does to queries between projection and attention: in one kernel, in a few passes of torch's, and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx.fusions import rotary
from rtlynx.norm_rotary import norm_rotary
from rtlynx.timing import time_interleaved


@dataclass(frozen=True)
class Heads:
    """Queries of a real model: tokens of an image, tokens of a text that come before, heads, and how many they are a part of in memory."""

    samples: int
    tokens: int
    first_tokens: int
    heads: int
    dim: int
    of: int = 1


HEADS: tuple[Heads, ...] = (
    Heads(1, 4096, 512, 24, 128),  # FLUX.1 and Qwen-Image, a double-stream block
    Heads(1, 4608, 0, 24, 128),  # FLUX.1, a single-stream block
    Heads(2, 4608, 0, 24, 128),  # two samples
    Heads(1, 4608, 0, 48, 128, of=9),  # FLUX.2, a single-stream block: three parts and the feed-forward's six in one projection
    Heads(1, 4608, 0, 48, 64),  # heads of half the channels
)


@dataclass(frozen=True)
class NormRotaryTimes:
    """One row of norm_rotary.csv. Times are milliseconds.

    Attributes:
        samples, tokens, first_tokens, heads, dim, of: See `Heads`.
        op_ms: `rtlynx.norm_rotary.norm_rotary`.
        passes_ms: ``F.rms_norm`` of each part, a float32 copy of both, a complex product in place, and a copy in 16 bits.
        compiled_ms: What diffusers writes, compiled.
        copy_ms: A device copy of as many bytes as the op has to move, without the angles.
    """

    samples: int
    tokens: int
    first_tokens: int
    heads: int
    dim: int
    of: int
    op_ms: float
    passes_ms: float
    compiled_ms: float
    copy_ms: float


@torch.no_grad()
def measure_norm_rotary(of: Heads, repeats: int = 30) -> NormRotaryTimes:
    """Time one of `HEADS` on the current device, in bfloat16, by angles as FLUX.1 gives them."""
    torch.manual_seed(of.tokens + of.dim)
    shape = of.samples, of.tokens, of.of * of.heads, of.dim
    x, weight = _random(*shape)[:, :, : of.heads], _random(of.dim)
    first = _random(of.samples, of.first_tokens, of.heads, of.dim) if of.first_tokens else None
    first_weight = None if first is None else _random(of.dim)
    angles = 100 * torch.randn(of.first_tokens + of.tokens, of.dim // 2, device="cuda").repeat_interleave(2, 1)
    cos, sin = angles.cos(), angles.sin()
    made = torch.compile(_as_diffusers, fullgraph=True, dynamic=False)

    def in_passes() -> Tensor:
        parts = _normed(x, weight, first, first_weight)
        return rotary.rotated(parts, rotary.rotation((cos, sin)))

    moved = of.samples * (of.first_tokens + of.tokens) * of.heads * of.dim
    source, target = _random(moved), _random(moved)
    calls = {
        "op": lambda: norm_rotary(x, cos[:, ::2], sin[:, ::2], weight, 1e-6, first, first_weight, 1e-6),
        "passes": in_passes,
        "compiled": lambda: made(x, cos, sin, weight, first, first_weight),
        "copy": lambda: target.copy_(source),
    }
    times = time_interleaved(calls, repeats)
    return NormRotaryTimes(
        of.samples, of.tokens, of.first_tokens, of.heads, of.dim, of.of, **{f"{call}_ms": ms for call, ms in times.items()}
    )


def _normed(x: Tensor, weight: Tensor, first: Tensor | None, first_weight: Tensor | None) -> list[Tensor]:
    parts = [F.rms_norm(x, (x.shape[-1],), weight, 1e-6)]
    return parts if first is None else [F.rms_norm(first, (x.shape[-1],), first_weight, 1e-6), *parts]


def _as_diffusers(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, first: Tensor | None, first_weight: Tensor | None) -> Tensor:
    """Norms, concatenation and ``apply_rotary_emb``, operation by operation."""
    both = torch.cat(_normed(x, weight, first, first_weight), 1)
    real, imaginary = both.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (both.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
