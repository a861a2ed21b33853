"""Which activations, and whether a norm, the selection kernel of a GPU does itself."""

from __future__ import annotations

import torch

from rtlynx.errors import RTLynxError
from rtlynx.reference import Activation


def selection_does(device: torch.device, activation: Activation) -> bool:
    """Whether selection on ``device`` computes ``activation`` of what it reads, rather than have torch compute it first.

    Args:
        device: Where the layer runs. On a CPU the reference does all of them.
        activation: See `rtlynx.reference.activated`.
    """
    return _kernel_does(device, activation)


def selection_norms(device: torch.device) -> bool:
    """Whether selection on ``device`` computes a norm of what it reads (`rtlynx.reference.normed`)."""
    return _kernel_does(device, "norm")


def _kernel_does(device: torch.device, what: str) -> bool:
    if device.type != "cuda":
        return True
    try:
        from rtlynx import _core

        return what in _core.activations(torch.cuda.current_device() if device.index is None else device.index)
    except (ImportError, RTLynxError):  # the op that is called instead says what to do about it
        return False


for _answer in (selection_does, selection_norms):
    torch.compiler.assume_constant_result(_answer)  # marks it: a compiled block holds the answer
