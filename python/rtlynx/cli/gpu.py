"""What all commands that measure a GPU ask first."""

from __future__ import annotations


def require_gpu() -> None:
    """Refuse to measure on a machine without a GPU."""
    import torch

    from rtlynx.errors import DeviceError

    if not torch.cuda.is_available():
        message = "there is no GPU to measure; `rtlynx info` shows what is missing"
        raise DeviceError("bench", "device", "no GPU", "a GPU", message)
