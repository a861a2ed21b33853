"""diffusers' rotary embedding of queries and keys in a third of the passes, eager.

A pair of channels is a complex number, and to rotate it is one product::

    diffusers:  neg → stack → float            here:  float → · (cos + i sin) → dtype
                       float · cos + … · sin → dtype

Both compute in float32 and round once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rtlynx.fusions import fusion

NAMES = "ValueError to device reshape shape unbind torch stack flatten cat float dtype view_as_complex unsqueeze view_as_real type_as"
"""What diffusers' ``apply_rotary_emb`` uses: see `known.why_not`."""


def rotates(x: Tensor, embedding: Any, channels: int) -> bool:
    """Whether what belongs to x is rotated here: eager, without gradients, by cosines and sines as FLUX.1 gives them.

    Args:
        x: What queries and keys are made of.
        embedding: FLUX.1's is ``(cos, sin)``, each ``(S, channels)`` float32, every angle twice in a row.
        channels: D of a head.
    """
    if torch.is_grad_enabled() or not fusion.eager(x) or not isinstance(embedding, tuple) or len(embedding) != 2:
        return False
    return all((each.dim(), each.shape[-1], each.dtype, each.device) == (2, channels, torch.float32, x.device) for each in embedding)


def rotation(embedding: tuple[Tensor, Tensor]) -> Tensor:
    """``(cos, sin)``, see `rotates`, as ``(S, 1, D / 2)`` complex64."""
    cos, sin = (each[:, None, ::2] for each in embedding)
    return torch.complex(cos, sin)


def rotated(parts: Sequence[Tensor], rotation: Tensor) -> Tensor:
    """The parts one after another, rotated.

    They are concatenated as they are widened, which costs no pass of its own, and rotated in place.

    Args:
        parts: One or several of ``(B, s, H, D)``, whose s are S together.
        rotation: ``(S, 1, D / 2)`` complex64, as `rotation` makes it of FLUX.1's.

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
