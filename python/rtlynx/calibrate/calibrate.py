"""`calibrate`: from prompts to a compensation, in closed form."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from rtlynx.apply import applied_modules, remember_config
from rtlynx.bias_groups import install_bias_groups
from rtlynx.calibrate.collect import Budget, LayerInput, all_dense, available_memory, collect_shared
from rtlynx.calibrate.fit import Fit, Tensors, fit_input, too_few, warn_of_few
from rtlynx.calibrate.processes import Processes
from rtlynx.calibrate.runs import Run, pipeline_runs, quiet
from rtlynx.calibrate.workfolder import WorkFolder, described
from rtlynx.compacted import refuse_compact
from rtlynx.compensation import Compensation
from rtlynx.config import SparsityConfig
from rtlynx.dense_steps import check_time, warn_of_a_guess
from rtlynx.eligibility import all_sparse_layers
from rtlynx.errors import InvalidArgumentError
from rtlynx.fingerprint import fingerprint
from rtlynx.linear import SparseLinear
from rtlynx.version import __version__

logger = logging.getLogger("rtlynx")

_METHOD_OF = {"dropped": "split", "input": "paper", "none": "plain"}
"""The configured branch → the method that fits it."""


def calibrate(
    pipe_or_module: object,
    prompts: str | Sequence[str] | None = None,
    *,
    run: Run | None = None,
    method: str | None = None,
    rank: int | None = None,
    selection: Sequence[str] = ("shift",),
    bias: bool | int = False,
    share: bool = True,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    tokens_per_channel: float = 4,
    batch_size: int = 1,
    memory: int | None = None,
    samples_device: torch.device | str | None = None,
    **pipe_kwargs: Any,
) -> Compensation:
    """Fit the compensation of every sparse layer to the dense model's own activations, and set it.

    The dense model runs on the prompts (or through ``run``) while a sample of the tokens of every distinct layer input is kept; then each
    layer is solved for. Nothing is trained. When anything fails the model is left as it was.

    Under ``accelerate launch`` or ``torchrun``, or wherever torch.distributed is initialised, the processes share prompts and layers: call
    it in all of them with the same arguments. Each ends with the same compensation; the first one writes and shows progress.

    Args:
        pipe_or_module: What was given to `rtlynx.apply`.
        prompts: Prompts for the pipeline, e.g. 32 of them; give these or `run`.
        run: For a bare module, or a pipeline with another interface: a callable without arguments that runs the model on all calibration
            inputs; of several processes, on this one's share of them. It must do the same every time, since it is called again where
            the samples of all layers do not fit in memory.
        method: One of `rtlynx.calibrate.METHODS`, e.g. ``"split"``: the branch reads what selection dropped; ``"paper"``: it reads the
            layer's input, as RT-Lynx does. Default: what suits the applied configuration's branch; another one changes that configuration.
        rank: Rank of every branch; default: the applied configuration's `rank` and `ranks`. Layers with fewer channels get what fits.
        selection: Options of the selection to fit too: ``"shift"``, ``"permutation"``, both or none. The paper selects without, `()`.
        bias: Whether a bias restores the mean of what is still missing. A number of groups splits the way from noise to picture into so
            many parts of equal length in noise level, each with a bias of its own: 4 gives every quarter one. True is 1.
        share: Whether layers that select from one input together (q, k and v) get one branch, so that they still can.
        output: Where to save the result. Layers that are solved are kept beside it, in ``<output>.work``, so that the same call goes on
            after an interruption; whether ``run`` is the same nobody can tell.
        seed: Of the pipeline's noise and of the sampling of tokens.
        progress: Whether to show progress bars.
        tokens_per_channel: Tokens to keep of one input, as a multiple of its channels, but `MIN_TOKENS` at least.
        batch_size: Prompts per run of the pipeline.
        memory: Bytes for samples; default: half of what is free on the GPU, or a quarter of the machine's memory, which its processes
            share. Where they do not fit the model runs several times.
        samples_device: Where samples are kept, e.g. ``"cpu"`` beside a GPU that is nearly full; default: where the model runs.
        **pipe_kwargs: For the pipeline, e.g. ``num_inference_steps=8``.

    Returns:
        What was fitted; the layers have it already.

    Raises:
        InvalidArgumentError: An argument does not fit, the model was not applied, a layer is compact, or an activation is not finite.
        DistributedError: Another process failed.
    """
    modules, config = applied_modules(pipe_or_module, "calibrate")
    config, fit = _settings(config, method, rank, tuple(selection), bias, share, seed)
    layers = all_sparse_layers(modules)
    refuse_compact("calibrate", layers, "layers that have their weights: calibrate before rtlynx.compact")
    runs = pipeline_runs("calibrate", pipe_or_module, prompts, run, seed, batch_size, pipe_kwargs)
    processes = Processes.present()
    if run is None:
        if len(runs) < processes.count:
            got = f"{len(runs)} batches of prompts for {processes.count} processes"
            raise InvalidArgumentError("calibrate", "prompts", got, "one batch for each at least")
        runs = processes.share(runs)
    if not layers:
        raise InvalidArgumentError("calibrate", "pipe_or_module", "a model whose layers all stayed dense", "a sparse layer")
    if fit.bias > 1:
        for root in modules.values():
            check_time(root, f"{bias} groups of timesteps", "calibrate", "bias")
            warn_of_a_guess(root, "calibrate: groups of timesteps")
    if not tokens_per_channel > 0:
        raise InvalidArgumentError("calibrate", "tokens_per_channel", tokens_per_channel, "a positive number")
    # Offloaded weights are on the CPU now, but the model runs, and its layers are solved, where the pipeline says.
    device = getattr(pipe_or_module, "_execution_device", next(iter(layers.values())).weight.device)
    kept_on = torch.device(samples_device or device)
    if memory is None:  # the machine's own is shared by its processes, a GPU's is not
        memory = available_memory(kept_on) // (processes.count if kept_on.type == "cpu" else 1)
    budget = Budget(tokens_per_channel, memory, kept_on)

    versions = {"rtlynx": __version__, "torch": str(torch.__version__)}
    lists = {"selection": list(fit.selection), "ranks": [list(pair) for pair in fit.ranks]}  # as JSON gives them back
    made_with = {**dataclasses.asdict(fit), **lists, "tokens_per_channel": tokens_per_channel, **versions}
    digests = fingerprint(layers)
    inputs = [prompts, batch_size, described(pipe_kwargs)]
    if any(theirs != digests for theirs in processes.exchange(digests)):
        raise InvalidArgumentError("calibrate", "pipe_or_module", "a model with other weights in another process", "the same in all")
    settings: dict[str, Any] = {**made_with, "config": config.to_dict(), "layers": digests, "runs": inputs}
    if processes.count > 1:  # whose samples are others
        settings["processes"] = processes.count

    folders: list[WorkFolder] = []  # of the process that writes

    def begin() -> dict[str, Tensors]:
        folders.extend([WorkFolder(output, settings)] if output is not None and processes.main else [])
        return folders[0].load() if folders else {}

    solved = processes.all(begin)[0]
    if solved:
        logger.info("calibrate: going on with %d of %d layers solved", len(solved), len(layers))

    few: list[str] = []
    waiting = {name: layer for name, layer in layers.items() if name not in solved}
    timed, shown = modules.values() if fit.bias > 1 else (), progress and processes.main
    with (
        quiet(pipe_or_module),
        all_dense(layers),
        tqdm(total=len(runs), desc="calibrate: dense runs", unit="run", disable=not shown) as run_bar,
        tqdm(total=len(layers), initial=len(solved), desc="calibrate: solving", unit="layer", disable=not shown) as fit_bar,
        closing(collect_shared(waiting, runs, budget, processes, seed=seed, bar=run_bar, timed=timed)) as found,
    ):
        for input in found:
            for names, round in processes.all(partial(_solve, input, fit, device)):
                few += names
                solved |= round
                for folder in folders if round else []:
                    folder.save(round)
                fit_bar.update(len(round))
            del input  # before the samples of the next one are gathered
    if processes.main:
        _warn(layers, solved, few)

    for name, layer in layers.items():
        layer.configure(config)
        layer.set_compensation(**solved.get(name, {}))
    for root in modules.values():
        remember_config(root, config)
        install_bias_groups(root)
    compensation = replace(Compensation.from_model(pipe_or_module), made_with=made_with)

    def write() -> None:
        if output is not None and processes.main:
            compensation.save(output)
            folders[0].remove()

    processes.all(write)  # so that every process finds the file when it goes on
    return compensation


def _solve(input: LayerInput | None, fit: Fit, device: torch.device) -> tuple[list[str], dict[str, Tensors]]:
    """The layers that saw few tokens, and the compensation of all that read ``input``."""
    if input is None:
        return [], {}
    if not len(input.samples):
        raise InvalidArgumentError("calibrate", "memory", f"so little that no token of {input.name} was kept", "more")
    return list(input.layers) if too_few(input) else [], dict(fit_input(input, fit, device))


def _settings(
    config: SparsityConfig, method: str | None, rank: int | None, selection: tuple[str, ...], bias: bool | int, share: bool, seed: int
) -> tuple[SparsityConfig, Fit]:
    """The applied configuration with the branch and rank asked for, and what to fit."""
    ranks = config.ranks if rank is None else ()
    rank = config.rank if rank is None else rank
    fit = Fit(method or _METHOD_OF[config.branch], rank, selection, bias, share, config.norm_compensation, seed, ranks=ranks)
    nothing_asked = fit.rule.branch == "none" and not (fit.rule.own_weight or selection or bias)
    if nothing_asked or (fit.rule.branch != "none" and not any((rank, *(each for _, each in ranks)))):
        got = f"method={fit.method!r}, rank={rank}"
        raise InvalidArgumentError("calibrate", "config", got, "something to fit: a branch, a selection option or a bias")
    return replace(config, branch=fit.rule.branch, rank=rank, ranks=ranks), fit


def _warn(layers: dict[str, SparseLinear], solved: dict[str, Tensors], few: list[str]) -> None:
    for name in layers:
        if name not in solved:
            logger.warning("calibrate: %s was never called; it gets no compensation", name)
    warn_of_few("calibrate", few)
