"""Which activations the selection kernel of a GPU does itself."""

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
    if device.type != "cuda":
        return True
    try:
        from rtlynx import _core

        return activation in _core.activations(torch.cuda.current_device() if device.index is None else device.index)
    except (ImportError, RTLynxError):  # the op that is called instead says what to do about it
        return False


torch.compiler.assume_constant_result(selection_does)  # marks it: a compiled block holds the answer
