"""`search`: the recipe with the least error within a budget of time, for one model, on its own activations."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from rtlynx.apply import applied_config, apply, remember_config
from rtlynx.calibrate.collect import Budget, LayerInput, all_dense, available_memory, collect
from rtlynx.calibrate.fit import Fit, too_few, warn_of_few
from rtlynx.calibrate.runs import Run, pipeline_runs, quiet
from rtlynx.calibrate.workfolder import WorkFolder, described
from rtlynx.compacted import refuse_compact
from rtlynx.compensation import Compensation
from rtlynx.config import SparsityConfig
from rtlynx.eligibility import sparse_layers, target_module, target_modules
from rtlynx.errors import InvalidArgumentError
from rtlynx.evaluate.trajectory import Trajectory
from rtlynx.fingerprint import fingerprint
from rtlynx.linear import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipe_file import write_recipe
from rtlynx.recipes import find_recipe
from rtlynx.search.effects import Effects
from rtlynx.search.knapsack import exchanges, solve
from rtlynx.search.options import Option, Unit, chosen, fit_units, label
from rtlynx.search.stored import store, stored
from rtlynx.search.times import option_times
from rtlynx.version import __version__

logger = logging.getLogger("rtlynx")

_ADDITION = (1.0, 0.75, 0.5)
"""Errors of different layers may add up as if independent (their squares do: 1) or in step (they themselves do: 0.5)."""
_CURVE = 6
"""Budgets, beside the one asked for, at which the trade is shown."""
_TOKENS_PER_CHANNEL = 4


@dataclass(frozen=True)
class Point:
    """One choice of options for all layers.

    Attributes:
        name: ``"found"``, ``"budget 85 %"``, ``"all sparse, rank 64"``, ``"paper's layers dense, rank 64"``.
        time: Of the layers in one step, in ms (of counted work: TFLOP).
        share: The same, of the dense layers' time.
        predicted: Relative error of the output, from probes, errors taken to be independent.
        measured: The same, measured on the held-out calls.
    """

    name: str
    time: float
    share: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Search:
    """What `search` found; the model has it already.

    Attributes:
        config: For `rtlynx.apply`.
        compensation: What was fitted for it.
        points: ``"found"`` first, then what else was measured.
        times_from: Where the times come from.
    """

    config: SparsityConfig
    compensation: Compensation
    points: tuple[Point, ...]
    times_from: str


def search(
    pipe_or_module: object,
    prompts: Sequence[str] | None = None,
    *,
    budget: float | Literal["paper"],
    run: Run | None = None,
    held_out: Run | None = None,
    config: SparsityConfig | None = None,
    ranks: Sequence[int] = (0, 32, 64, 128),
    method: str = "split",
    selection: Sequence[str] = ("shift",),
    times: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    probes: int = 1,
    calls: int = 8,
    refine: int = 8,
    seed: int = 0,
    batch_size: int = 1,
    memory: int | None = None,
    progress: bool = True,
    **pipe_kwargs: Any,
) -> Search:
    """Choose for every layer whether it is dense, sparse, or sparse with a branch of some rank; then apply and fit that.

    Layers that select from one input together get one option. Time and error of every option are measured or estimated (see
    `rtlynx.search`), the best choice within the budget is found as a knapsack, measured on the held-out calls, and improved by exchanges.

    Args:
        pipe_or_module: A pipeline, or a module with ``run``. Of two transformers (Wan 2.2) give one at a time, with ``run``.
        prompts: Typical ones, 16 or more; options are fitted on three quarters of them and judged on the others.
        budget: Time of the layers in one step, as a share of the dense layers' (0.85), or ``"paper"``: what it takes with the layers that
            the paper picked by hand left dense and the largest rank for the others; of models that it has no list for, refused.
        run: For a bare module: runs the model on calibration inputs, the same every time.
        held_out: Likewise, on other inputs to judge by; default: ``run``.
        config: Which layers to choose from, and how they select; default: what was applied, else `SparsityConfig()`.
        ranks: Ranks to choose from; 0 for no branch.
        method: As in `rtlynx.calibrate`, one that has a branch.
        selection: Likewise.
        times: ``layer.csv`` of ``rtlynx bench gemm``, to take times from instead of measuring them here; ``"work"`` to count the work of
            tensor cores instead, whatever kernels make of it.
        output: Where to save the recipe, e.g. ``"recipe.json"``. What is fitted is kept beside it, in ``<output>.work``, so that the same
            call goes on after an interruption; whether ``run`` is the same nobody can tell.
        probes: Random probes of every held-out call.
        calls: Held-out calls of each run, evenly spread over its steps.
        refine: Exchanges to measure.
        seed: Of noise, samples and probes.
        batch_size: Prompts per run.
        memory: Bytes for samples, as in `rtlynx.calibrate`.
        progress: Whether to show progress bars.
        **pipe_kwargs: For the pipeline, e.g. ``num_inference_steps=8``.

    Raises:
        InvalidArgumentError: An argument does not fit, a layer is compact, times cannot be had, or the budget cannot be met.
        ImportError: SciPy is not installed (``pip install "rtlynx[search]"``).
    """
    root = target_module(pipe_or_module, "search")
    if len(target_modules(pipe_or_module, "search")) > 1:
        raise InvalidArgumentError("search", "pipe_or_module", "a pipeline with two transformers", "one transformer at a time, with run=")
    refuse_compact("search", sparse_layers(root), "layers that have their weights: search before rtlynx.compact")
    options: list[Option] = [None, *sorted(set(ranks))]
    config = replace(config or applied_config(root) or SparsityConfig(), rank=max(ranks, default=0), ranks=())
    fit = Fit(method, config.rank, tuple(selection), norm_compensation=config.norm_compensation, seed=seed)
    _check(fit, budget, options, probes, calls)
    recipe = find_recipe(root)
    if budget == "paper" and not recipe.paper_skip:
        got = f"'paper', of which the {recipe.name} recipe has no list of layers"
        raise InvalidArgumentError("search", "budget", got, "a share of the dense time, up to 1")
    fit_runs, judge_runs = _runs(pipe_or_module, prompts, run, held_out, seed, batch_size, pipe_kwargs)

    config = replace(config, branch=fit.rule.branch)
    apply(root, config)
    layers = sparse_layers(root)
    inputs = [prompts if prompts is None else list(prompts), batch_size, described(pipe_kwargs)]
    folder = None if output is None else WorkFolder(output, _settings(fit, options, config, layers, inputs), "search")
    units = [] if folder is None else stored(folder, layers)
    solved = {name for unit in units for name in unit.layers}
    if solved:
        logger.info("search: going on with %d of %d layers fitted", len(solved), len(layers))
    waiting = {name: layer for name, layer in layers.items() if name not in solved}
    device = getattr(pipe_or_module, "_execution_device", next(iter(layers.values())).weight.device)
    few: list[str] = []
    samples = Budget(_TOKENS_PER_CHANNEL, available_memory(device) if memory is None else memory, device)
    with quiet(pipe_or_module):
        with (
            all_dense(layers),
            tqdm(total=len(fit_runs), desc="search: dense runs", unit="run", disable=not progress) as bar,
            closing(collect(waiting, fit_runs, samples, seed=seed, bar=bar, op="search")) as found,
        ):
            for of_one_input in fit_units(_noting_few(found, few), fit, options[1:], device):  # type: ignore[arg-type]
                units += of_one_input
                if folder is not None:
                    store(folder, of_one_input)
        places = {name: i for i, name in enumerate(layers)}
        units.sort(key=lambda unit: places[unit.name])  # whichever of them were stored
        warn_of_few("search", few)
        for name in sorted(layers.keys() - {name for unit in units for name in unit.layers}):
            logger.warning("search: %s was never called; it stays dense", name)
        for layer in layers.values():
            layer.set_compensation()
        with all_dense(layers):
            trajectory = record(root, judge_runs, calls)
            effects = Effects(units, options)
            total = probes * len(trajectory.calls)
            for _ in tqdm(effects.measure(root, trajectory, probes, seed), desc="search: probes", total=total, disable=not progress):
                pass
            milliseconds, times_from = option_times(units, options, effects.rows, config, times)
            with tqdm(desc="search: measuring", unit="choice", disable=not progress) as bar:
                chooser = Chooser(root, units, options, effects.single, milliseconds, trajectory, bar.update)
                points, best = chooser.choose(chooser.limit(budget), refine)
    config = config_of(config, units, [options[o] for o in best])
    apply(root, config)
    for unit, o in zip(units, best, strict=True):
        if options[o] is not None:
            unit.choose(options[o])
    remember_config(root, config)
    settings = {"method": method, "selection": list(selection), "budget": budget, "times": times_from}
    made_with = {**settings, "points": [asdict(point) for point in points]}
    if output is not None:
        write_recipe(output, config, {"model": type(root).__name__, **made_with})
    if folder is not None:
        folder.remove()
    return Search(config, replace(Compensation.from_model(root), made_with=made_with), tuple(points), times_from)


def _settings(
    fit: Fit, options: Sequence[Option], config: SparsityConfig, layers: dict[str, SparseLinear], inputs: object
) -> dict[str, Any]:
    """All that what is fitted depends on and that can be told apart."""
    versions = {"rtlynx": __version__, "torch": str(torch.__version__)}
    about = {"ranks to choose from": options, "config": config.to_dict(), "layers": fingerprint(layers), "runs": inputs}
    return {**asdict(fit), **about, "tokens_per_channel": _TOKENS_PER_CHANNEL, **versions}


def _noting_few(inputs: Iterable[LayerInput], few: list[str]) -> Iterator[LayerInput]:
    """The same, while the layers of those with too few samples are written down."""
    for input in inputs:
        if too_few(input):
            few += input.layers
        yield input


class Chooser:
    """Chooses by estimates, and measures what was chosen."""

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[Unit],
        options: Sequence[Option],
        errors: torch.Tensor,
        times: torch.Tensor,
        trajectory: Trajectory,
        on_measured: Callable[[], object],
    ) -> None:
        self.root, self.units, self.options, self.errors, self.times = root, units, options, errors, times
        self.trajectory, self.on_measured = trajectory, on_measured
        self.dense = float(times[:, 0].sum())
        self._known: dict[tuple[int, ...], float] = {}

    def limit(self, budget: float | Literal["paper"]) -> float:
        """The budget as a time."""
        return budget * self.dense if not isinstance(budget, str) else self._time(self._by_hand(len(self.options) - 1))

    def choose(self, limit: float, refine: int) -> tuple[list[Point], list[int]]:
        """The points to show, and the best choice within the limit as indices of options."""
        best = self._best(limit)
        for _ in range(refine):
            tried = [c for c in exchanges(best, self.errors, self.times, limit, 4 * refine) if tuple(c) not in self._known]
            if not tried:
                break
            best = min(best, tried[0], key=self._measured)
        points = [self._point("found", best)]
        fastest = float(self.times.min(1).values.sum())
        for i in range(_CURVE):
            time = fastest + (self.dense - fastest) * i / _CURVE
            if fastest < self.dense:
                points.append(self._point(f"budget {time / self.dense:.0%}", self._best(time, additions=(1.0,))))
        for o, option in enumerate(self.options):
            points.append(self._point(f"all {label(option)}", [o] * len(self.units)))
        by_hand = self._by_hand(len(self.options) - 1)
        if len(set(by_hand)) > 1:
            points.append(self._point(f"paper's layers dense, others {label(self.options[-1])}", by_hand))
        return points, best

    def _best(self, limit: float, additions: Sequence[float] = _ADDITION) -> list[int]:
        found = [solve(self.errors.pow(power), self.times, limit) for power in additions]
        return min(found, key=self._measured) if len(found) > 1 else found[0]

    def _by_hand(self, option: int) -> list[int]:
        skipped = find_recipe(self.root).paper_skip
        return [0 if any(first_match(name, skipped) for name in unit.layers) else option for unit in self.units]

    def _measured(self, choice: Sequence[int]) -> float:
        """Relative error of the output on the held-out calls."""
        key = tuple(choice)
        if key not in self._known:
            with chosen(self.units, [self.options[o] for o in choice]):
                self._known[key] = self.trajectory.errors(self.root).relative()
            self.on_measured()
        return self._known[key]

    def _time(self, choice: Sequence[int]) -> float:
        return float(self.times[torch.arange(len(choice)), torch.tensor(choice)].sum())

    def _point(self, name: str, choice: Sequence[int]) -> Point:
        time = self._time(choice)
        predicted = float(self.errors[torch.arange(len(choice)), torch.tensor(choice)].sum()) ** 0.5
        return Point(name, time, time / self.dense, predicted, self._measured(choice))


def _check(fit: Fit, budget: float | Literal["paper"], options: Sequence[Option], probes: int, calls: int) -> None:
    if fit.rule.branch == "none":
        raise InvalidArgumentError("search", "method", repr(fit.method), "one with a branch")
    if budget != "paper" and (isinstance(budget, str) or not 0 < budget <= 1):
        raise InvalidArgumentError("search", "budget", repr(budget), '"paper", or a share of the dense time, up to 1')
    if len(options) < 2 or probes < 1 or calls < 1:
        got = f"{len(options) - 1} ranks, {probes} probes, {calls} calls"
        raise InvalidArgumentError("search", "ranks, probes and calls", got, "at least one of each")


def _runs(
    pipe: object,
    prompts: Sequence[str] | None,
    run: Run | None,
    held_out: Run | None,
    seed: int,
    batch_size: int,
    pipe_kwargs: dict[str, Any],
) -> tuple[list[Run], list[Run]]:
    """What to fit on, and what to judge by."""
    if run is not None or prompts is None:
        fitting = pipeline_runs("search", pipe, prompts, run, seed, batch_size, pipe_kwargs)
        return fitting, fitting if held_out is None else [held_out]
    if isinstance(prompts, str) or len(prompts) < 2:
        raise InvalidArgumentError("search", "prompts", repr(prompts), "a list of at least two: some are held out")
    others = max(1, len(prompts) // 4)
    fitting = pipeline_runs("search", pipe, prompts[:-others], None, seed, batch_size, pipe_kwargs)
    return fitting, pipeline_runs("search", pipe, prompts[-others:], None, seed + 1_000_003, batch_size, pipe_kwargs)


def record(root: nn.Module, runs: Sequence[Run], calls: int) -> Trajectory:
    """Calls of the dense model on the held-out runs; the first run says how many there are in one."""
    counted = [0]
    handle = root.register_forward_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
    try:
        runs[0]()
    finally:
        handle.remove()
    wanted = {round((i + 0.5) * counted[0] / calls - 0.5) for i in range(calls)}
    trajectory = Trajectory()
    with trajectory.recording(root, lambda call: call in wanted):
        for run in runs:
            run()
            trajectory.begin_run()
    if not trajectory.calls:
        raise InvalidArgumentError("search", "held-out runs", "no call of the model", "runs that call it")
    return trajectory


def config_of(config: SparsityConfig, units: Sequence[Unit], choice: Sequence[Option]) -> SparsityConfig:
    """The configuration that says the choice: sparse layers by name, and their ranks where they are not the usual one."""
    ranks = {name: option for unit, option in zip(units, choice, strict=True) if option is not None for name in unit.layers}
    if not ranks:
        raise InvalidArgumentError("search", "budget", "one that needs no sparse layer", "a smaller one")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = tuple((name, rank) for name, rank in ranks.items() if rank != usual)
    return replace(config, include=tuple(ranks), skip=(), rank=usual, ranks=others)
