"""`apply` makes the layers of a model sparse, `remove` gives the original back."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from rtlynx.config import SparsityConfig
from rtlynx.eligibility import Candidate, candidates, linear_layers, target_module
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipes import find_recipe

logger = logging.getLogger("rtlynx")

T = TypeVar("T")

_CONFIG = "rtlynx_config"
"""The attribute of the model that remembers the configuration it was given."""


def apply(pipe_or_module: T, config: SparsityConfig | None = None) -> T:
    """Replace the linear layers that ``config`` names by `SparseLinear`, in place. No weight is copied or changed.

    A layer that cannot be sparse stays dense; the reason is logged (logger ``"rtlynx"``) and `rtlynx.summary` shows it. Applying again
    applies the new configuration instead; a compensation is kept where it is still right and dropped, with a log record, where it is not.

    Apply before offloading hooks wrap the layers, and before ``torch.compile`` traces them.

    Args:
        pipe_or_module: A module, or a pipeline with a ``.transformer`` or ``.unet``.
        config: What to make sparse, and how; default `SparsityConfig()`.

    Returns:
        The same object.

    Raises:
        InvalidArgumentError: No layer at all is named by the configuration, or a sparse layer that is to become dense is wrapped by a hook.
    """
    config = config or SparsityConfig()
    root = target_module(pipe_or_module, "apply")
    judged = list(candidates(root, config))
    if not any(c.wanted for c in judged):
        patterns = find_recipe(root).include if config.include is None else config.include
        got = f"{', '.join(patterns)} minus {', '.join(config.skip) or 'nothing'}"
        raise InvalidArgumentError("apply", "config", got, f"patterns that name a linear layer of {type(root).__name__}")

    # First what can refuse (wrapped layers), then what changes the model.
    replaced: dict[nn.Module, nn.Module] = {}
    for c in judged:
        if c.reason is None and not isinstance(c.module, SparseLinear):
            replaced.setdefault(c.module, SparseLinear.from_linear(c.module, config))
        elif c.reason is not None and isinstance(c.module, SparseLinear):
            replaced.setdefault(c.module, c.module.to_linear())
    keep = _still_right(applied_config(root), config)
    dropped = 0
    for layer in {c.module for c in judged if isinstance(c.module, SparseLinear)} - set(replaced):
        if layer.rank and not keep:
            layer.set_compensation()
            dropped += 1
        layer.configure(config)
    _replace(root, replaced)
    root.__dict__[_CONFIG] = config
    _log(root, judged, config, dropped)
    if isinstance(getattr(pipe_or_module, "transformer_2", None), nn.Module):
        logger.warning("apply: the pipeline's transformer_2 stays as it is; to make it sparse too, give it to rtlynx.apply itself")
    return pipe_or_module


def remove(pipe_or_module: T) -> T:
    """Undo `apply`: every `SparseLinear` becomes the plain ``nn.Linear`` it was, with the same Parameter objects.

    The compensation is lost unless it was saved (`rtlynx.save_compensation`). A model without sparse layers is left as it is.

    Args:
        pipe_or_module: What was given to `apply`, or its module.

    Returns:
        The same object.

    Raises:
        InvalidArgumentError: A sparse layer is wrapped by an offloading hook: remove that first.
    """
    root = target_module(pipe_or_module, "remove")
    _replace(root, {layer: layer.to_linear() for _, layer in linear_layers(root) if isinstance(layer, SparseLinear)})
    root.__dict__.pop(_CONFIG, None)
    return pipe_or_module


def applied_config(module: nn.Module) -> SparsityConfig | None:
    """The configuration `apply` gave to this module, or None if it was not applied to it."""
    config = module.__dict__.get(_CONFIG)
    return config if isinstance(config, SparsityConfig) else None


def remember_config(module: nn.Module, config: SparsityConfig) -> None:
    """Record that ``module`` now computes as ``config`` says: for calibration, which may change the branch and the rank."""
    module.__dict__[_CONFIG] = config


def _still_right(previous: SparsityConfig | None, config: SparsityConfig) -> bool:
    """Whether what was calibrated under ``previous`` is what ``config`` asks for, the choice of layers aside."""
    return previous is not None and previous.same_arithmetic(config) and previous.rank == config.rank


def _replace(root: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Swap children wherever they hang, so that a layer used under two names stays one layer."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def _log(root: nn.Module, judged: list[Candidate], config: SparsityConfig, dropped: int) -> None:
    sparse = sum(c.reason is None for c in judged)
    logger.info("%s: %d of %d linear layers are sparse (recipe %s)", type(root).__name__, sparse, len(judged), find_recipe(root).name)
    if dropped:
        logger.warning("dropped the compensation of %d layers: it was fitted for another configuration; calibrate again", dropped)
    for pattern in config.skip:
        if not any(first_match(c.name, [pattern]) for c in judged):
            logger.warning("the skip pattern %r names no linear layer of %s", pattern, type(root).__name__)
    by_reason: dict[tuple[bool, str], list[str]] = {}
    for c in judged:
        if c.reason is not None:
            by_reason.setdefault((c.wanted, c.reason), []).append(c.name)
    for (wanted, reason), names in by_reason.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        logger.log(logging.WARNING if wanted else logging.INFO, "dense: %s%s: %s", names[0], others, reason)
