"""`torch.autocast`: torch casts for an ``nn.Linear`` under it, but knows nothing of sparse layers, which therefore ask here."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which dtype linear layers on ``device`` answer under ``torch.autocast``; None where it is off."""
    kind = device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):  # torch refuses to be asked about devices such as meta
        return None
    return torch.get_autocast_dtype(kind)
