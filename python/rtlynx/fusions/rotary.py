"""What diffusers does to queries and keys between projection and attention, norm, concatenation and rotary embedding, in one pass or a few.

On a GPU that has the kernel all of it is one op, `rtlynx.norm_rotary`, eager and compiled. Where the norm is more than a norm, or does not
fit, eager code takes a third of diffusers' passes. A pair of channels is a complex number, and to rotate it is one product::

    diffusers:  neg → stack → float            here:  float → · (cos + i sin) → dtype
                       float · cos + … · sin → dtype

All compute in float32 and round once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

from rtlynx import norm_rotary
from rtlynx.autocast import autocast_dtype
from rtlynx.checks import SUPPORTED_DTYPES
from rtlynx.fusions import fusion, norms
from rtlynx.fusions.fusion import plain

NAMES = "ValueError to device reshape shape unbind torch stack flatten cat float dtype view_as_complex unsqueeze view_as_real type_as"
"""What diffusers' ``apply_rotary_emb`` uses: see `known.why_not`."""

Embedding = tuple[Tensor, Tensor] | Tensor
"""By what is rotated: FLUX.1's, see `rotates`, or ``(S, D / 2, 2)`` float32, cosine and sine of every pair of channels."""
Normed = tuple[Sequence[Tensor], Sequence[nn.Module | None]]
"""One or several of ``(B, s, H, D)``, whose s are S together, and the norm that each goes through first; None: it goes through none."""


def rotates(x: Tensor, embedding: Any, channels: int, *normed_by: nn.Module | None) -> bool:
    """Whether what belongs to x is rotated here: without gradients, by cosines and sines as FLUX.1 gives them, eager or `in_one_pass`.

    Args:
        x: What queries and keys are made of.
        embedding: FLUX.1's is ``(cos, sin)``, each ``(S, channels)`` float32, every angle twice in a row.
        channels: D of a head.
        normed_by: What queries and keys go through first.
    """
    if torch.is_grad_enabled() or not isinstance(embedding, tuple) or len(embedding) != 2:
        return False
    if not fusion.eager(x) and not in_one_pass(x, channels, *normed_by):
        return False
    return all((each.dim(), each.shape[-1], each.dtype, each.device) == (2, channels, torch.float32, x.device) for each in embedding)


def in_one_pass(x: Tensor, channels: int, *normed_by: nn.Module | None) -> bool:
    """Whether one kernel, `rtlynx.norm_rotary`, takes heads of D channels, of the dtype and on the device of x, through such norms.

    Not with gradients, nor under ``torch.autocast``, where queries and keys may be of another dtype.
    """
    if torch.is_grad_enabled() or not norm_rotary.available(x.device) or autocast_dtype(x.device) is not None:
        return False
    if not norm_rotary.takes(channels) or x.dtype not in SUPPORTED_DTYPES.get(x.device.type, ()):
        return False
    return all(norm is None or _is_rms_norm(norm, x, channels) for norm in normed_by)


def _is_rms_norm(norm: Any, x: Tensor, channels: int) -> bool:
    """Whether it is an RMS norm of the channels with a weight as x, and nothing more."""
    if plain(norm, nn.RMSNorm):
        over = norm.normalized_shape
    elif plain(norm, normalization.RMSNorm) or plain(norm, norms.RMSNorm):
        over = norm.dim if norm.bias is None else ()
    else:
        return False
    weight = norm.weight
    return (
        tuple(over) == (channels,) and norm.eps is not None and weight is not None and (weight.dtype, weight.device) == (x.dtype, x.device)
    )


def normed_and_rotated(heads: Sequence[Normed], embedding: Embedding) -> list[Tensor]:
    """Queries, and keys: their parts normed, one after another, rotated.

    Args:
        heads: At least one. D and the dtype of all parts are the same.
        embedding: Of S tokens.

    Returns:
        For each ``(B, S, H, D)``, of the parts' dtype.
    """
    (x, *_), _ = heads[0]
    parts = [part for parts, _ in heads for part in parts]
    normed_by = [norm for _, norms in heads for norm in norms]
    cos, sin = _angles(embedding)
    fits = all(part.dtype == x.dtype for part in parts) and all(cos.shape[0] == sum(part.shape[1] for part in parts) for parts, _ in heads)
    if fits and max(len(parts) for parts, _ in heads) <= 2 and in_one_pass(x, x.shape[-1], *normed_by):
        return [_in_one_pass(*each, cos, sin) for each in heads]
    by = rotation(embedding)
    return [rotated([part if norm is None else norm(part) for part, norm in zip(*each, strict=True)], by) for each in heads]


def _in_one_pass(parts: Sequence[Tensor], normed_by: Sequence[nn.Module | None], cos: Tensor, sin: Tensor) -> Tensor:
    weights = [(None, 0.0) if norm is None else (norm.weight, norm.eps) for norm in normed_by]
    first, first_norm = (parts[0], weights[0]) if len(parts) == 2 else (None, (None, 0.0))
    return norm_rotary.norm_rotary(parts[-1], cos, sin, *weights[-1], first, *first_norm)  # type: ignore[call-arg]  # mypy cannot count them


def _angles(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``(S, D / 2)`` each, where they are."""
    if isinstance(embedding, tuple):
        cos, sin = embedding
        return cos[:, ::2], sin[:, ::2]
    cos, sin = embedding.unbind(-1)
    return cos, sin


def rotation(embedding: Embedding) -> Tensor:
    """The same as ``(S, 1, D / 2)`` complex64."""
    if isinstance(embedding, tuple):
        cos, sin = (each[:, None, ::2] for each in embedding)
        return torch.complex(cos, sin)
    return torch.view_as_complex(embedding)[:, None]


def rotated(parts: Sequence[Tensor], rotation: Tensor) -> Tensor:
    """The parts one after another, rotated.

    They are concatenated as they are widened, which costs no pass of its own, and rotated in place.

    Args:
        parts: One or several of ``(B, s, H, D)``, whose s are S together.
        rotation: ``(S, 1, D / 2)`` complex64.

    Returns:
        ``(B, S, H, D)``, of the parts' dtype.
    """
    samples, _, *head = parts[0].shape
    lengths = [part.shape[1] for part in parts]
    wide = parts[0].new_empty(samples, sum(lengths), *head, dtype=torch.float32)
    for part, place in zip(parts, wide.split(lengths, 1), strict=True):
        place.copy_(part)
    wide.view(torch.complex64).mul_(rotation)
    return wide.to(torch.result_type(parts[0], parts[-1]))
