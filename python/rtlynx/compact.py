"""`compact`: of the weights of layers that multiply in fp8, keep the e4m3 copy alone."""

from __future__ import annotations

import logging

import torch
from torch import nn

from rtlynx.apply import applied_config
from rtlynx.checks import SUPPORTED_DTYPES
from rtlynx.derived import only_permuted
from rtlynx.eligibility import sparse_layers, target_modules
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear

logger = logging.getLogger("rtlynx")


def compact(pipe_or_module: object) -> int:
    """Free the weights of sparse layers with ``precision="fp8"`` and keep their e4m3 copies, in place, layer by layer.

    The copy becomes the layer's `weight`, in the memory it has, with ``compact_scale`` beside it. Sparse products stay what they were, bit
    for bit. Where such a layer computes densely (`dense`, dense steps) it multiplies by what the copy stands for, so the dense model is
    that of rounded weights. A layer with a weight that was fitted for its sparse product (``method="joint"``, ``"refit"``) gives up both,
    and raises where it is asked for a dense product.

    Nothing gets the weights back: `remove`, `refresh`, `calibrate`, `search`, `evaluate`, compensation files, another precision or
    selection, and fusing adapters or projections raise from then on. Call it last, but before offloading, layerwise casting and
    ``torch.compile``.

    A layer that has to keep its weight stays as it is; a log record (logger ``"rtlynx"``) and `rtlynx.summary` say why. A second call
    does nothing.

    Args:
        pipe_or_module: What was given to `rtlynx.apply`, or its module.

    Returns:
        Bytes that the layers no longer hold. They are free where nothing else holds the same parameters.

    Raises:
        InvalidArgumentError: No layer multiplies in fp8, or weights are offloaded, about to be, or stored in another dtype by layerwise
            casting. Nothing has changed then.
    """
    roots = target_modules(pipe_or_module, "compact").values()
    found = [layer for root in roots for layer in sparse_layers(root).values()]
    if not any(layer.precision == "fp8" for layer in found):
        got = "a model without a layer that multiplies in fp8"
        raise InvalidArgumentError("compact", "pipe_or_module", got, 'one given to rtlynx.apply with precision="fp8"')
    for root in roots:
        _check_place(root)
    return sum(_compact(root) for root in roots)


def kept_weights(root: nn.Module) -> dict[SparseLinear, str]:
    """The sparse layers of ``root`` that `compact` leaves with their weights, and why."""
    first, config = _tells_dtype(root), applied_config(root)
    densely = config is not None and config.multiplies_densely
    kept: dict[SparseLinear, str] = {}
    for layer in sparse_layers(root).values():
        if layer.is_compact:
            continue
        if layer.precision != "fp8":
            kept[layer] = f'precision="{layer.precision}"'
        elif _is_fitted(layer) and (layer.dense or densely):
            kept[layer] = "it computes densely too, and its sparse product has another weight"
        elif layer.weight is first:
            kept[layer] = "diffusers reads the model's dtype from its weight"
    return kept


def _compact(root: nn.Module) -> int:
    layers, kept = sparse_layers(root), kept_weights(root)
    freed = count = 0
    seen: set[int] = set()
    for layer in layers.values():
        if layer in kept or layer.is_compact:
            continue
        if layer.weight_fp8 is None:
            layer.update_weight_fp8()
        for gone in (layer.weight, layer.sparse_weight):
            if gone is not None and gone.data_ptr() not in seen:
                seen.add(gone.data_ptr())
                freed += gone.nbytes
        del gone
        layer.become_compact(_is_fitted(layer))
        freed -= sum(scale.nbytes for scale in (layer.compact_scale, layer.compact_values_scale) if scale is not None)
        count += 1
    _tell(root, freed, count, len(layers), {name: kept[layer] for name, layer in layers.items() if layer in kept})
    return freed


def _is_fitted(layer: SparseLinear) -> bool:
    """Whether its sparse product has a weight of its own, which is not the dense one in another order."""
    return layer.sparse_weight is not None and not only_permuted(layer)


def _check_place(root: nn.Module) -> None:
    """Refuse weights that are not here, or not in the dtype they compute in.

    Raises:
        InvalidArgumentError: There are such.
    """
    for name, layer in sparse_layers(root).items():
        if layer.is_compact:
            continue
        if layer.weight.is_meta:
            raise InvalidArgumentError("compact", "pipe_or_module", f"offloaded weights (first {name})", "rtlynx.compact before offloading")
        if layer.weight.dtype not in SUPPORTED_DTYPES["cpu"]:
            stored = f"weights stored in {str(layer.weight.dtype).removeprefix('torch.')} (first {name})"
            raise InvalidArgumentError("compact", "pipe_or_module", stored, "rtlynx.compact before layerwise casting")
    if any(_group_offloaded(module) for module in root.modules()):
        got = "a model with group offloading, which holds the weights too"
        raise InvalidArgumentError("compact", "pipe_or_module", got, "rtlynx.compact before enable_group_offload")


def _group_offloaded(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    return registry is not None and registry.get_hook("group_offloading") is not None


def _tells_dtype(root: nn.Module) -> nn.Parameter | None:
    """The parameter whose dtype diffusers takes for the model's, which pipelines cast their inputs to; None if it is no such model."""
    if not isinstance(getattr(root, "dtype", None), torch.dtype):
        return None
    away: list[str] = getattr(root, "_keep_in_fp32_modules", None) or []
    floating = ((name, parameter) for name, parameter in root.named_parameters() if parameter.is_floating_point())
    return next((parameter for name, parameter in floating if not any(part in name for part in away)), None)


def _remember(root: nn.Module) -> None:
    """Let ``save_pretrained`` tell of rtlynx: read as the weights of a dense model, those of a compact one would be wrong."""
    config = applied_config(root)
    if config is not None and hasattr(root, "register_to_config"):
        from rtlynx.integrations.diffusers import AppliedConfig

        root.register_to_config(quantization_config=AppliedConfig(root, config))  # type: ignore[operator]


def _tell(root: nn.Module, freed: int, count: int, layers: int, kept: dict[str, str]) -> None:
    if count:
        _remember(root)
    message = "compact: %s: %d of %d sparse layers gave up their weights, %d bytes"
    logger.info(message, type(root).__name__, count, layers, freed)
    for reason in dict.fromkeys(kept.values()):
        names = [name for name, other in kept.items() if other == reason]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.warning("compact: not %s%s: %s", names[0], others, reason)
