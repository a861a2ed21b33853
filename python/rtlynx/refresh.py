"""`refresh`: after the weights of a sparse model changed, for example by a LoRA that was fused into them."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from rtlynx.compacted import refuse_compact
from rtlynx.eligibility import all_sparse_layers, canonical, sparse_layers, target_modules
from rtlynx.layerwise_casting import refuse_stored
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
        InvalidArgumentError: A layer is compact (`rtlynx.compact`): it holds nothing to prepare anything from. Or layerwise casting stores
            its weight in 8 bits: what is prepared would be rounded twice.
    """
    layers = all_sparse_layers(target_modules(pipe_or_module, "refresh"))
    refuse_compact("refresh", layers, "layers that have their weights")
    refuse_stored("refresh", layers)
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
        layer.update_output_bias()
        if layer.score is not None:
            layer.update_score()
    return [name for name, layer in here.items() if layer.derived is not None and not layer.derived.fits(layer)]


def refresh_with_adapters(root: nn.Module) -> None:
    """From now on the class of ``root``, and pipelines, refresh sparse models when they fuse adapters or take them out again."""
    for cls in type(root).__mro__:
        # Taken out again, weights are what they were but for rounding: nothing to warn of.
        _refresh_after(cls, "fuse_lora", _fused)
        _refresh_after(cls, "unfuse_lora", _refresh)
    _refresh_after_pipelines()


def _fused(root: nn.Module) -> None:
    _refresh_after_pipelines()  # the pipeline that called may have been imported after `refresh_with_adapters`
    _refresh_and_tell(root)


def _refresh_after_pipelines() -> None:
    """The same for pipelines: they fuse by their models' ``fuse_lora``, but take adapters out of layers without asking the model."""
    lora_base = sys.modules.get("diffusers.loaders.lora_base")  # there is no pipeline yet where nobody has imported it
    if lora_base is not None:
        _refresh_after(lora_base.LoraBaseMixin, "unfuse_lora", _refresh_parts)


def _refresh_parts(pipe: Any) -> None:
    for model in _models(pipe):
        _refresh(model)


def _models(pipe_or_module: Any) -> list[nn.Module]:
    """Those with sparse layers."""
    parts = [pipe_or_module] if isinstance(pipe_or_module, nn.Module) else getattr(pipe_or_module, "components", {}).values()
    return [part for part in parts if isinstance(part, nn.Module) and sparse_layers(part)]


def _refresh_after(cls: type, name: str, after: Callable[[Any], object]) -> None:
    method = vars(cls).get(name)
    if method is not None and not hasattr(method, "_rtlynx"):
        setattr(cls, name, _then(method, after))


def _then(method: Callable[..., Any], after: Callable[[Any], object]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        for model in _models(self):
            _refuse_fusing(method.__name__, model)
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
