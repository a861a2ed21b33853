"""Group offloading that moves single layers ahead of time: layers that it moves hold nothing in common."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from rtlynx.eligibility import sparse_layers
from rtlynx.sharing import share_inputs

logger = logging.getLogger("rtlynx")


def unshare_before_moving_ahead(root: nn.Module) -> None:
    """From now on ``enable_group_offload`` of the class of ``root`` lets layers select for themselves where it would move them ahead.

    On a stream of its own, diffusers fills the next layer while this one runs: what both hold would be overwritten under the one that
    reads.
    """
    for cls in type(root).__mro__:
        method = vars(cls).get("enable_group_offload")
        if method is not None and not hasattr(method, "_rtlynx"):
            setattr(cls, "enable_group_offload", _unshared(method))  # noqa: B010  # not an attribute of every class


def _unshared(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        # An enumeration of strings, or one of them.
        leaves = getattr(given.get("offload_type"), "value", given.get("offload_type")) == "leaf_level"
        shared = [name for name, layer in sparse_layers(self).items() if layer.sharing > 1]
        if leaves and given.get("use_stream") and shared:
            message = "%s: %d layers that share a selection select for themselves from now on: offloading moves each ahead of time"
            logger.warning(message, type(self).__name__, len(shared))
            share_inputs(self, enabled=False)
        return method(self, *args, **kwargs)

    wrapped._rtlynx = True  # type: ignore[attr-defined]
    return wrapped
