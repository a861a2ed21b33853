"""`calibrate`: from prompts to a compensation, in closed form."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from rtlynx.apply import applied_config, remember_config
from rtlynx.calibrate.collect import all_dense, available_memory, collect, passes
from rtlynx.calibrate.solve import FEW_TOKENS_RIDGE, RIDGE, Factors, fit_branch, fitting_rank
from rtlynx.calibrate.statistics import LayerStatistics
from rtlynx.compensation import Compensation
from rtlynx.config import SparsityConfig
from rtlynx.eligibility import sparse_layers, target_module
from rtlynx.errors import InvalidArgumentError

logger = logging.getLogger("rtlynx")

Method = Literal["split", "paper"]
_BRANCH_OF: dict[str, Any] = {"split": "dropped", "paper": "input"}

_TOKENS_PER_CHANNEL = 2
"""Below this many sampled tokens per input channel the small directions of the statistics are noise."""


def calibrate(
    pipe_or_module: object,
    prompts: str | Sequence[str] | None = None,
    *,
    run: Callable[[], object] | None = None,
    method: Method | None = None,
    rank: int | None = None,
    seed: int = 0,
    progress: bool = True,
    max_tokens: int = 512,
    batch_size: int = 1,
    memory: int | None = None,
    **pipe_kwargs: Any,
) -> Compensation:
    """Fit the branch of every sparse layer to the dense model's own activations, and set it.

    The dense model runs on the prompts (or through ``run``) while second moments of every layer's input are accumulated; then each branch
    is solved for in closed form (`rtlynx.calibrate.solve`), with the weight fixed. Nothing is trained. When anything fails the
    model is left as it was.

    Args:
        pipe_or_module: What was given to `rtlynx.apply`.
        prompts: Prompts for the pipeline, e.g. 32 of them; give these or `run`.
        run: For a bare module, or a pipeline with another interface: a callable without arguments that runs the model on all calibration
            inputs. It must do the same every time, since it is called once for each group of layers whose statistics fit in memory.
        method: ``"split"``: the branch reads what selection dropped. ``"paper"``: it reads the layer's input, as RT-Lynx does. Default: the
            one of the applied configuration; another one changes that configuration.
        rank: Rank of the branch; default: the applied configuration's. Layers with fewer channels get what fits.
        seed: Of the pipeline's noise and of the sampling of tokens.
        progress: Whether to show progress bars.
        max_tokens: Tokens sampled from one call of one layer at most. Together (prompts × steps × max_tokens) they should be 4 to 8
            times a layer's input channels.
        batch_size: Prompts per run of the pipeline.
        memory: Bytes for statistics (8·K² a layer, half of that for split without norm compensation); default: half of what is free on
            the GPU, or a quarter of the machine's memory.
        **pipe_kwargs: For the pipeline, e.g. ``num_inference_steps=8``.

    Returns:
        What was fitted; the layers have it already.

    Raises:
        InvalidArgumentError: An argument does not fit, the model was not applied, or an activation is not finite.
    """
    root = target_module(pipe_or_module, "calibrate")
    config = _config_for(root, method, rank)
    layers = sparse_layers(root)
    runs = _runs(pipe_or_module, prompts, run, seed, batch_size, pipe_kwargs)
    if not layers:
        raise InvalidArgumentError("calibrate", "pipe_or_module", "a model whose layers all stayed dense", "a sparse layer")
    if max_tokens < 1:
        raise InvalidArgumentError("calibrate", "max_tokens", max_tokens, "at least 1")
    # Offloaded weights are on the CPU now, but the model runs, and its statistics live, where the pipeline says.
    device = getattr(pipe_or_module, "_execution_device", next(iter(layers.values())).weight.device)
    groups = passes(layers, config.branch, available_memory(device) if memory is None else memory)
    if len(groups) > 1:
        logger.info("calibrate: statistics do not fit in memory at once; the model runs %d times on every prompt", len(groups))

    fitted: dict[str, Factors | None] = {}
    few: list[str] = []
    seeds = {name: seed + i for i, name in enumerate(layers)}
    with (
        _quiet(pipe_or_module),
        all_dense(layers),
        tqdm(total=len(groups) * len(runs), desc="calibrate: dense runs", unit="run", disable=not progress) as run_bar,
        tqdm(total=len(layers), desc="calibrate: fitting", unit="layer", disable=not progress) as fit_bar,
    ):
        for group in groups:
            statistics = collect(group, config.branch, runs, max_tokens=max_tokens, seeds=seeds, bar=run_bar)
            for name in list(statistics):
                fitted[name] = _fit(name, statistics.pop(name), config.rank, few)
                fit_bar.update()

    if few:
        message = "calibrate: %d layers saw fewer than %d tokens per channel, first %s: use more prompts"
        logger.warning(message, len(few), _TOKENS_PER_CHANNEL, few[0])
    for name, layer in layers.items():
        layer.configure(config)
        down, up = fitted[name] or (None, None)
        layer.set_compensation(down, up, layer.shift)
    remember_config(root, config)
    return Compensation.from_model(root)


def _config_for(root: nn.Module, method: str | None, rank: int | None) -> SparsityConfig:
    """The applied configuration with the branch and rank asked for."""
    config = applied_config(root)
    if config is None:
        raise InvalidArgumentError("calibrate", "pipe_or_module", "a model without sparse layers", "one given to rtlynx.apply")
    if method is not None and method not in _BRANCH_OF:
        raise InvalidArgumentError("calibrate", "method", repr(method), " or ".join(map(repr, _BRANCH_OF)))
    if method is not None:
        config = replace(config, branch=_BRANCH_OF[method])
    if rank is not None:
        config = replace(config, rank=rank)
    if config.branch == "none" or config.rank == 0:
        got = f"branch={config.branch!r}, rank={config.rank}"
        raise InvalidArgumentError("calibrate", "config", got, "a branch to fit: pass method= or rank=")
    return config


def _fit(name: str, statistics: LayerStatistics, rank: int, few: list[str]) -> Factors | None:
    """The branch of one layer in its dtype, or None for a layer that cannot have one; adds the name to ``few`` if tokens were."""
    layer = statistics.layer
    rank = fitting_rank(rank, layer.in_features, layer.out_features)
    if statistics.sampled == 0:
        logger.warning("calibrate: %s was never called; it gets no branch", name)
        return None
    if rank == 0:
        logger.warning("calibrate: %s is too small for a branch", name)
        return None
    ridge = RIDGE
    if statistics.sampled < _TOKENS_PER_CHANNEL * layer.in_features:
        few.append(name)
        ridge = FEW_TOKENS_RIDGE
    statistics.finish()
    factors = fit_branch(statistics.zz, statistics.ze, layer.weight, rank, ridge)
    return Factors(*(factor.to(layer.weight) for factor in factors))


def _runs(
    pipe: Any,
    prompts: str | Sequence[str] | None,
    run: Callable[[], object] | None,
    seed: int,
    batch_size: int,
    pipe_kwargs: dict[str, Any],
) -> list[Callable[[], object]]:
    """One callable per batch of prompts, or ``run`` alone."""
    if (prompts is None) == (run is None):
        raise InvalidArgumentError("calibrate", "prompts and run", "both or neither", "one of them")
    if run is not None:
        if pipe_kwargs:
            raise InvalidArgumentError("calibrate", "keyword arguments", ", ".join(pipe_kwargs), "none with `run`")
        return [run]
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise InvalidArgumentError("calibrate", "prompts", "prompts for a bare module", "a pipeline, or `run`")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not prompts or batch_size < 1:
        raise InvalidArgumentError("calibrate", "prompts", f"{len(prompts)} prompts in batches of {batch_size}", "at least one of each")
    accepted = inspect.signature(pipe.__call__).parameters
    defaults = {key: value for key, value in {"output_type": "latent"}.items() if key in accepted}  # images are not needed

    def one(first: int) -> Callable[[], object]:
        def call() -> object:
            generator = torch.Generator().manual_seed(seed + first)
            return pipe(prompt=prompts[first : first + batch_size], **{"generator": generator, **defaults, **pipe_kwargs})

        return call

    return [one(first) for first in range(0, len(prompts), batch_size)]


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Switch off a diffusers pipeline's own progress bar inside the block: one bar at a time."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
