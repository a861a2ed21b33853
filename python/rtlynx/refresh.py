"""`refresh`: after the weights of a sparse model changed, for example by a LoRA that was fused into them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from rtlynx.compacted import refuse_compact
from rtlynx.eligibility import all_sparse_layers, canonical, target_modules
from rtlynx.linear import SparseLinear

logger = logging.getLogger("rtlynx")

T = TypeVar("T")


def refresh(pipe_or_module: T) -> T:
    """Let what sparse layers prepared from their weights follow weights that have changed: scores, copies of them, the bias of a shift.

    diffusers' ``fuse_lora`` and ``unfuse_lora`` do this by themselves; call it after other changes (peft's ``merge_adapter``, another
    checkpoint loaded in place). What was fitted cannot follow: where a layer's branch was fitted to other weights, a log record (logger
    ``"rtlynx"``) says so. Such layers still work, with a compensation that knows nothing of the change; `rtlynx.calibrate` fits it again.

    Args:
        pipe_or_module: What was given to `rtlynx.apply`, or its module.

    Returns:
        The same object.

    Raises:
        InvalidArgumentError: A layer is compact (`rtlynx.compact`): it holds nothing to prepare anything from.
    """
    refuse_compact("refresh", all_sparse_layers(target_modules(pipe_or_module, "refresh")), "layers that have their weights")
    return _refresh_and_tell(pipe_or_module)


def _refresh_and_tell(pipe_or_module: T) -> T:
    outdated = _refresh(pipe_or_module)
    if outdated:
        message = "refresh: the compensation of %d layers was fitted to other weights (first %s): calibrate again, or do not fuse adapters"
        logger.warning(message, len(outdated), outdated[0])
    return pipe_or_module


def _refresh(pipe_or_module: object) -> list[str]:
    """Renew what can be, which is nothing in compact layers; returns the layers whose compensation was fitted to other weights."""
    layers = all_sparse_layers(target_modules(pipe_or_module, "refresh"))
    away = [name for name, layer in layers.items() if layer.weight.is_meta]
    if away:
        logger.warning("refresh: the weights of %d layers are offloaded (first %s): refresh before offloading", len(away), away[0])
    here = {name: layer for name, layer in layers.items() if not layer.weight.is_meta and not layer.is_compact}
    for layer in here.values():
        if layer.derived is not None:
            layer.derived.renew(layer)
        layer.update_weight_fp8()
        if layer.score is not None:
            layer.update_score()
    return [name for name, layer in here.items() if layer.derived is not None and not layer.derived.fits(layer)]


def refresh_with_adapters(root: nn.Module) -> None:
    """From now on the class of ``root`` refreshes sparse models when it fuses adapters or takes them out again."""
    for cls in type(root).__mro__:
        for name in ("fuse_lora", "unfuse_lora"):
            method = vars(cls).get(name)
            if method is not None and not hasattr(method, "_rtlynx"):
                # Taken out again, weights are what they were but for rounding: nothing to warn of.
                setattr(cls, name, _then(method, _refresh_and_tell if name == "fuse_lora" else _refresh))


def _then(method: Callable[..., Any], after: Callable[[nn.Module], object]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _refuse_fusing(method.__name__, self)
        result = method(self, *args, **kwargs)
        after(self)
        return result

    wrapped._rtlynx = True  # type: ignore[attr-defined]
    return wrapped


def _refuse_fusing(op: str, root: nn.Module) -> None:
    """Refuse adapters that would be added to compact weights, or taken out of them, before one of them is."""
    adapted = {
        canonical(name): layer
        for name, layer in root.named_modules()
        if name.endswith(".base_layer")
        and isinstance(layer, SparseLinear)
        and _changes(op, root.get_submodule(name.removesuffix(".base_layer")))
    }
    refuse_compact(op, adapted, "adapters that stay unfused, or fused before rtlynx.compact")


def _changes(op: str, wrapper: nn.Module) -> bool:
    return op == "fuse_lora" or bool(getattr(wrapper, "merged", True))
