"""Which model a compensation was made for: a short digest of every sparse layer's shape and weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from rtlynx.errors import CompensationMismatchError, InvalidArgumentError

_SAMPLES = 4096
"""Weight elements that enter a digest, evenly spaced: enough to tell models apart, cheap to read back from a GPU."""


def fingerprint(layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Digest of every layer: SHA-256 over its shape and a sample of its weight as float32, so the same on any device.

    A model loaded in another precision has other digests where values were rounded.

    Args:
        layers: Name → layer.

    Returns:
        Name → 16 hexadecimal digits.

    Raises:
        InvalidArgumentError: A weight is on the meta device, so that there is nothing to digest.
    """
    return {name: _digest(name, layer.weight) for name, layer in layers.items()}


def check_fingerprint(expected: Mapping[str, str], layers: Mapping[str, nn.Linear]) -> None:
    """Refuse a model whose sparse layers are not those of ``expected``; layers the model keeps dense are not looked at.

    Args:
        expected: Name → digest, from `fingerprint`.
        layers: Name → sparse layer of the model at hand.

    Raises:
        CompensationMismatchError: Naming the layers that differ, the first few of them.
    """
    missing = [name for name in layers if name not in expected]
    if missing:
        message = f"made without {_some(missing)}, which this model has as sparse layers"
        raise _mismatch(f"sparse layers {_some(missing)}", "no sparse layer that it was made without", message)
    if not layers:
        message = f"made for layers such as {_some(sorted(expected))}; this model has no sparse layer"
        raise _mismatch("no sparse layer", f"sparse layers such as {_some(sorted(expected))}", message)
    changed = [name for name, digest in fingerprint(layers).items() if digest != expected[name]]
    if changed:
        differ = f"{len(changed)} of {len(layers)} layers differ, first {_some(changed)}"
        message = f"made for other weights (another model, another precision, a fused LoRA?): {differ}"
        raise _mismatch(f"other weights: {differ}", "the weights that it was made for", message)


def _mismatch(got: str, expected: str, message: str) -> CompensationMismatchError:
    return CompensationMismatchError("Compensation", "pipe_or_module", got, expected, message)


def _digest(name: str, weight: torch.Tensor) -> str:
    if weight.is_meta:
        raise InvalidArgumentError("fingerprint", name, "a weight on the meta device", "loaded weights")
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.float32).contiguous()
    return hashlib.sha256(str(tuple(weight.shape)).encode() + sample.numpy().tobytes()).hexdigest()[:16]


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
