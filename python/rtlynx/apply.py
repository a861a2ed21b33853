"""`apply` makes the layers of a model sparse, `remove` gives the original back."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from rtlynx.adaln_shift import check_adaln_shift, install_adaln_shift
from rtlynx.bias_groups import install_bias_groups, remove_bias_groups
from rtlynx.compacted import check_reconfigured, refuse_compact
from rtlynx.config import SparsityConfig
from rtlynx.dense_steps import check_clock, install_dense_steps
from rtlynx.eligibility import Candidate, all_sparse_layers, candidates, linear_layers, target_modules
from rtlynx.errors import InvalidArgumentError
from rtlynx.fused_projections import keep_fused_sparse
from rtlynx.fusions import install_fusions
from rtlynx.linear import SparseLinear
from rtlynx.offloading import unshare_before_moving_ahead
from rtlynx.patterns import first_match
from rtlynx.recipe_file import read_recipe
from rtlynx.recipes import find_recipe
from rtlynx.refresh import refresh_with_adapters
from rtlynx.sharing import share_inputs

logger = logging.getLogger("rtlynx")

T = TypeVar("T")

_CONFIG = "rtlynx_config"
"""The attribute of the model that remembers the configuration it was given."""


def apply(pipe_or_module: T, config: SparsityConfig | str | os.PathLike[str] | None = None) -> T:
    """Replace the linear layers that ``config`` names by `SparseLinear`, in place. No weight is changed, and only fp8 makes copies.

    A layer that cannot be sparse stays dense; the reason is logged (logger ``"rtlynx"``) and `rtlynx.summary` shows it. Applying again
    applies the new configuration instead; a compensation is kept where it is still right and dropped, with a log record, where it is not.

    Apply before offloading hooks wrap the layers, and before ``torch.compile`` traces them.

    Args:
        pipe_or_module: A module, or a pipeline with a ``.transformer`` or ``.unet``. If it has a ``.transformer_2`` too, as Wan 2.2's
            pipelines do, or an ``.unconditional_transformer``, as Ideogram 4's, that one is made sparse in the same way; patterns name
            layers inside each of them.
        config: What to make sparse, and how, or a recipe file of `rtlynx.search`; default `SparsityConfig()`.

    Returns:
        The same object.

    Raises:
        InvalidArgumentError: No layer at all is named by the configuration, a sparse layer that is to become dense is wrapped by a hook, or
            the configuration asks of a compact layer what it has no weight for (see `rtlynx.compact`), or `adaln_shift` of a model in which
            nobody knows where a shift comes from.
    """
    if isinstance(config, (str, os.PathLike)):
        config = read_recipe(config)
    if config is None:
        config = SparsityConfig()
    if not isinstance(config, SparsityConfig):
        raise InvalidArgumentError("apply", "config", f"a {type(config).__name__}", "a SparsityConfig, or the path of a recipe file")
    judged = {root: list(candidates(root, config)) for root in target_modules(pipe_or_module, "apply").values()}
    if not any(c.wanted for found in judged.values() for c in found):
        root = next(iter(judged))
        patterns = find_recipe(root).include if config.include is None else config.include
        got = f"{', '.join(patterns)} minus {', '.join(config.skip) or 'nothing'}"
        raise InvalidArgumentError("apply", "config", got, f"patterns that name a linear layer of {type(root).__name__}")

    # First what can refuse (wrapped layers), then what changes the model.
    for root, found in judged.items():
        check_clock(root, config)
        check_adaln_shift(root, config)
        check_reconfigured(found, config, keep=_still_right(applied_config(root), config))
        _refuse_wrapped("apply", {c.name: c.module for c in found if c.reason is not None and isinstance(c.module, SparseLinear)})
    replaced = {root: _new_layers(found, config) for root, found in judged.items()}
    for root, found in judged.items():
        dropped = _reconfigure(found, set(replaced[root]), config, keep=_still_right(applied_config(root), config))
        _replace(root, replaced[root])
        for layer in share_inputs(root, config.share_inputs):
            layer.update_score()
        keep_fused_sparse(root)
        install_fusions(root, config.fuse)
        refresh_with_adapters(root)
        unshare_before_moving_ahead(root)
        install_dense_steps(root, config)
        install_adaln_shift(root, config.adaln_shift)
        install_bias_groups(root)
        root.__dict__[_CONFIG] = config
        _log(root, found, config, dropped)
    return pipe_or_module


def remove(pipe_or_module: T) -> T:
    """Undo `apply`: every `SparseLinear` becomes the plain ``nn.Linear`` it was, with the same Parameter objects.

    The compensation is lost unless it was saved (`rtlynx.save_compensation`). A model without sparse layers is left as it is.

    Args:
        pipe_or_module: What was given to `apply`, or its module.

    Returns:
        The same object.

    Raises:
        InvalidArgumentError: A sparse layer is wrapped by a hook, of offloading or layerwise casting: remove that first. Or one is compact:
            its weight is gone (see `rtlynx.compact`).
    """
    layers = all_sparse_layers(target_modules(pipe_or_module, "remove"))
    refuse_compact("remove", layers, "their weights: load the model again")
    _refuse_wrapped("remove", layers)
    replaced: dict[nn.Module, dict[nn.Module, nn.Module]] = {
        root: {layer: layer.to_linear() for _, layer in linear_layers(root) if isinstance(layer, SparseLinear)}
        for root in target_modules(pipe_or_module, "remove").values()
    }
    for root, new in replaced.items():
        install_dense_steps(root, None)
        install_adaln_shift(root, False)
        remove_bias_groups(root)
        install_fusions(root, False)
        _replace(root, new)
        root.__dict__.pop(_CONFIG, None)
        integration = sys.modules.get("rtlynx.integrations.diffusers")  # nobody else writes of rtlynx into a model's config
        if integration is not None:
            integration.forget(root)
    return pipe_or_module


def applied_config(module: nn.Module) -> SparsityConfig | None:
    """The configuration `apply` gave to this module, or None if it was not applied to it."""
    config = module.__dict__.get(_CONFIG)
    return config if isinstance(config, SparsityConfig) else None


def applied_modules(pipe_or_module: object, op: str) -> tuple[dict[str, nn.Module], SparsityConfig]:
    """Those of the modules that `apply` was called on, by prefix, and their configuration.

    Raises:
        InvalidArgumentError: There is none, or they have different configurations.
    """
    modules = {prefix: root for prefix, root in target_modules(pipe_or_module, op).items() if applied_config(root) is not None}
    configs = [config for config in map(applied_config, modules.values()) if config is not None]
    if not configs:
        raise InvalidArgumentError(op, "pipe_or_module", "a model without sparse layers", "one given to rtlynx.apply")
    if any(config != configs[0] for config in configs):
        raise InvalidArgumentError(op, "pipe_or_module", "transformers with different configurations", "one of them at a time")
    return modules, configs[0]


def remember_config(module: nn.Module, config: SparsityConfig) -> None:
    """Record that ``module`` now computes as ``config`` says: for calibration, which may change the branch and the rank."""
    module.__dict__[_CONFIG] = config


def _still_right(previous: SparsityConfig | None, config: SparsityConfig) -> bool:
    """Whether what was calibrated under ``previous`` is what ``config`` asks for, the choice of layers aside."""
    return previous is not None and previous.same_arithmetic(config) and (previous.rank, previous.ranks) == (config.rank, config.ranks)


def _refuse_wrapped(op: str, layers: Mapping[str, SparseLinear]) -> None:
    """Refuse to make layers dense whose forward a hook has wrapped: the wrapper is bound to the layer and cannot move.

    Raises:
        InvalidArgumentError: There is such a layer.
    """
    wrapped = [name for name, layer in layers.items() if "forward" in layer.__dict__]
    if wrapped:
        got = f"{len(wrapped)} sparse layers whose forward is wrapped by a hook (first {wrapped[0]})"
        expected = "layers without: remove offloading first; layerwise casting cannot be undone, so before that"
        raise InvalidArgumentError(op, "pipe_or_module", got, expected)


def _new_layers(judged: list[Candidate], config: SparsityConfig) -> dict[nn.Module, nn.Module]:
    """Layer → what takes its place, for those whose kind changes."""
    new: dict[nn.Module, nn.Module] = {}
    for c in judged:
        if c.reason is None and not isinstance(c.module, SparseLinear):
            new.setdefault(c.module, SparseLinear.from_linear(c.module, config))
        elif c.reason is not None and isinstance(c.module, SparseLinear):
            new.setdefault(c.module, c.module.to_linear())
    return new


def _reconfigure(judged: list[Candidate], replaced: set[nn.Module], config: SparsityConfig, *, keep: bool) -> int:
    """Configure the layers that stay sparse; returns how many lost their compensation, which they do unless it is to be kept."""
    dropped = 0
    for layer in {c.module for c in judged if isinstance(c.module, SparseLinear)} - replaced:
        if layer.rank and not keep:
            layer.set_compensation()
            dropped += 1
        layer.configure(config)
    return dropped


def _replace(root: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Swap children wherever they hang, so that a layer used under two names stays one layer."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def _log(root: nn.Module, judged: list[Candidate], config: SparsityConfig, dropped: int) -> None:
    sparse = sum(c.reason is None for c in judged)
    logger.info("%s: %d of %d linear layers are sparse (recipe %s)", type(root).__name__, sparse, len(judged), find_recipe(root).name)
    if not any(c.wanted for c in judged):
        logger.warning("apply: %s has no layer that the configuration names: it stays as it is", type(root).__name__)
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
