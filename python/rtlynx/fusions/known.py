"""Which blocks have a fused form, and where diffusers looks blocks up by their class."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
from types import CodeType
from typing import Any

from torch import nn

logger = logging.getLogger("rtlynx")

_HOMES = {
    "diffusers.models.attention.FeedForward": "feed_forward",
    "diffusers.models.normalization.AdaLayerNormZero": "norms",
    "diffusers.models.normalization.AdaLayerNormZeroSingle": "norms",
    "diffusers.models.normalization.RMSNorm": "norms",
    "diffusers.models.transformers.transformer_chroma.ChromaSingleTransformerBlock": "chroma",
    "diffusers.models.transformers.transformer_flux.FluxAttention": "flux_attention",
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": "flux",
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock": "flux",
    "diffusers.models.transformers.transformer_flux2.Flux2Attention": "flux2_attention",
    "diffusers.models.transformers.transformer_flux2.Flux2FeedForward": "flux2",
    "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention": "flux2",
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": "hunyuan_video",
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformerBlock": "qwen_image",
    "diffusers.models.transformers.transformer_wan.WanAttention": "wan_attention",
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": "wan",
    "diffusers.models.transformers.transformer_z_image.FeedForward": "z_image",
}
"""Class → the file here that fuses it, in a class of the same name: diffusers finds blocks to compile by the names of their classes."""


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that takes the place of this one; None, with a log record where there should be one, if there is none."""
    home = _HOMES.get(f"{cls.__module__}.{cls.__qualname__}")
    if home is None:
        return None
    try:
        fused: type[nn.Module] = getattr(importlib.import_module(f"rtlynx.fusions.{home}"), cls.__name__)
    except (ImportError, AttributeError) as error:
        logger.info("fuse: %s stays as it is: %s", cls.__name__, error)
        return None
    reason = why_not(cls, fused)
    if reason is not None:
        logger.info("fuse: %s stays as it is: %s", cls.__name__, reason)
    return fused if reason is None else None


def why_not(cls: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """Why the fused forward may not be the same as that of the installed diffusers, or None.

    A forward that is written out here is held against the original's parameters and the names it uses, or those that what it `replaces`
    (a function or several) uses.
    """
    mine, theirs = (list(inspect.signature(each.forward).parameters) for each in (fused, cls))
    if mine != theirs:
        return f"its forward takes {', '.join(theirs)}, not {', '.join(mine)}"
    written_for: str | None = getattr(fused, "written_for", None)
    if written_for is None:
        return None
    replaced = getattr(fused, "replaces", cls.forward)
    used = {name for each in (replaced if isinstance(replaced, tuple) else (replaced,)) for name in _names(inspect.unwrap(each).__code__)}
    unknown = sorted(used - set(written_for.split()))
    return f"its forward uses {', '.join(unknown)}" if unknown else None


def _names(code: CodeType) -> set[str]:
    """The names that code uses, and what is defined in it."""
    return set(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))


def known_to_hooks(fused: Any) -> None:
    """diffusers' caches look up by class what a block returns: the same as the original."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        TransformerBlockRegistry.register(fused, dataclasses.replace(TransformerBlockRegistry.get(fused.unfused)))
    except (ImportError, ValueError):  # a diffusers without them, or a block that they do not serve
        pass
