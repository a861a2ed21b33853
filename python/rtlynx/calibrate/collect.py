"""Run the dense model and keep a sample of the tokens of every *distinct input* of its sparse layers (q, k and v share theirs)."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rtlynx.adaln_shift import shifted_though_dense
from rtlynx.calibrate.processes import ALONE, Processes
from rtlynx.calibrate.samples import Reservoir, Samples, capacity_within, seed_of
from rtlynx.dense_steps import noise_level
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear

logger = logging.getLogger("rtlynx")

_REMEMBERED_INPUTS = 4
"""How many distinct inputs back a layer's input is recognised: layers that share one run close together, and each holds its memory."""


@dataclass(frozen=True)
class LayerInput:
    """One distinct input of the model and the layers that read it.

    Attributes:
        layers: Name → layer, in the order they were called.
        samples: A sample of its tokens.
        seen: How many there were.
    """

    layers: dict[str, SparseLinear]
    samples: Samples
    seen: int

    @property
    def name(self) -> str:
        """The first layer's name."""
        return next(iter(self.layers))


@dataclass(frozen=True)
class Budget:
    """How much to keep.

    Attributes:
        tokens_per_channel: Tokens to keep of one input, as a multiple of its channels.
        memory: Bytes for everything kept at once.
        device: Where to keep it.
    """

    tokens_per_channel: float
    memory: int
    device: torch.device


def collect(
    layers: Mapping[str, SparseLinear],
    runs: Sequence[Callable[[], object]],
    budget: Budget,
    *,
    seed: int,
    bar: tqdm[Any],
    timed: Iterable[nn.Module] = (),
    op: str = "calibrate",
) -> Generator[LayerInput, None, None]:
    """Inputs of ``layers`` with samples of their tokens, in as many passes over ``runs`` as the memory asks for.

    Inputs come in the order in which the model calls for them; those of one pass are released as they are consumed. Layers that
    are never called do not come. The model must be dense meanwhile (`all_dense`).

    Args:
        layers: Name → layer.
        runs: Callables that each run the model once, on the same inputs every time; results are dropped.
        budget: How much to keep.
        seed: Decides which tokens are kept.
        bar: Progress bar; its total grows when another pass turns out to be needed.
        timed: The models that the layers are in, for the samples to know the noise level of the step they were taken in; reading it waits
            for the device once per step.
        op: Who asks, for the message of an error.

    Raises:
        InvalidArgumentError: An input was not finite, or a layer's input was shared differently in another pass.
    """
    for watched in _passes(layers, runs, budget, seed, bar, timed, ALONE, op):
        while watched.inputs:
            kept = watched.inputs.pop(0)
            yield LayerInput(kept.layers, kept.reservoir.samples(), kept.reservoir.seen)


def collect_shared(
    layers: Mapping[str, SparseLinear],
    runs: Sequence[Callable[[], object]],
    budget: Budget,
    processes: Processes,
    *,
    seed: int,
    bar: tqdm[Any],
    timed: Iterable[nn.Module] = (),
) -> Generator[LayerInput | None, None, None]:
    """As `collect`, by several processes at once: each has its own ``runs`` and gets, with samples from all, the inputs it is to solve.

    They come in rounds, of one input per process and of much the same size; None in a round that has none for this process. All processes
    must take all rounds.

    Args:
        layers: As in `collect`, as are the others.
        runs: Those of this process.
        budget: Likewise; all processes keep to the smallest memory.
        processes: This one and the others.
        seed: Decides which tokens are kept.
        bar: Progress bar.
        timed: The models that the layers are in.

    Raises:
        InvalidArgumentError: As in `collect`, or the processes' models call different layers.
        DistributedError: Another process failed.
    """
    budget = replace(budget, memory=min(processes.exchange(budget.memory)))
    for watched in _passes(layers, runs, budget, seed, bar, timed, processes):
        inputs = watched.inputs
        found = processes.exchange([(list(input.layers), input.reservoir.rate) for input in inputs])
        if any([names for names, _ in theirs] != [names for names, _ in found[0]] for theirs in found):
            expected = "the same model, whose layers are called alike in all"
            raise InvalidArgumentError("calibrate", "pipe_or_module", "processes whose models call different layers", expected)
        _level(inputs, [[rate for _, rate in theirs] for theirs in found])
        if processes.count > 1:
            inputs.sort(key=lambda input: -next(iter(input.layers.values())).in_features)
        while inputs:
            mine = None
            for owner in range(min(processes.count, len(inputs))):
                kept = inputs.pop(0)
                seen = sum(processes.exchange(kept.reservoir.seen))
                samples = _gathered(kept.reservoir.samples(), processes, owner)
                if samples is not None:
                    mine = LayerInput(kept.layers, samples, seen)
                del kept, samples
            yield mine
            del mine  # before the next are gathered


def _level(inputs: list[_Watched], rates: list[list[float]]) -> None:
    """Make every token as likely as any other, whichever process saw it: ``rates`` are those of all inputs in each process."""
    for input, theirs in zip(inputs, zip(*rates, strict=True), strict=True):
        input.reservoir.lower_rate(min(theirs))


def _gathered(samples: Samples, processes: Processes, owner: int) -> Samples | None:
    """The samples of all processes at ``owner``."""
    x, step, level = (None if each is None else processes.gather(each, owner) for each in (samples.x, samples.step, samples.level))
    return None if x is None or step is None else Samples(x, step, level)


def _passes(
    layers: Mapping[str, SparseLinear],
    runs: Sequence[Callable[[], object]],
    budget: Budget,
    seed: int,
    bar: tqdm[Any],
    timed: Iterable[nn.Module],
    processes: Processes,
    op: str = "calibrate",
) -> Iterator[_Pass]:
    """One after the other, each run; the next one needs the memory of what was kept."""
    waiting = dict(layers)
    while waiting:
        bar.total = bar.n + len(runs)
        bar.refresh()
        watched = _Pass(waiting, budget, seed, timed, processes, op)

        def run_all(watched: _Pass = watched) -> None:
            with watched:
                for run in runs:
                    watched.begin_run()
                    run()
                    watched.check_finite()
                    bar.update()

        processes.all(run_all)
        if not watched.inputs:
            return
        if watched.postponed:
            logger.info("calibrate: %d of %d layers do not fit in memory at once: another pass", len(watched.postponed), len(waiting))
        waiting = {name: layer for name, layer in waiting.items() if name in watched.postponed}
        yield watched


@dataclass
class _Watched:
    """An input in the making."""

    layers: dict[str, SparseLinear]
    reservoir: Reservoir
    finite: Tensor
    calls: int = 0


class _Pass:
    """Hooks on the layers while the model runs over all inputs once."""

    def __init__(
        self, layers: Mapping[str, SparseLinear], budget: Budget, seed: int, timed: Iterable[nn.Module], processes: Processes, op: str
    ) -> None:
        self.op, self.layers, self.budget, self.seed, self.timed, self.processes = op, layers, budget, seed, timed, processes
        self._level = math.nan
        self.inputs: list[_Watched] = []
        self.postponed: set[str] = set()
        self._leader: dict[str, _Watched] = {}  # of layers that were called before: whose input theirs is
        self._recent: deque[tuple[Tensor, int, _Watched | None]] = deque(maxlen=_REMEMBERED_INPUTS)  # version; None: postponed
        self._left = budget.memory
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: self._read(name, args[0]))
            self._hooks.callback(handle.remove)
        for root in self.timed:
            self._hooks.callback(root.register_forward_pre_hook(self._read_time, with_kwargs=True).remove)

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._recent.clear()
        self._leader.clear()  # or inputs would stay in memory that were consumed

    def begin_run(self) -> None:
        self._recent.clear()
        self._level = math.nan
        for input in self.inputs:
            input.calls = 0

    def check_finite(self) -> None:
        for input in self.inputs:
            if not input.finite:
                name = next(iter(input.layers))
                raise InvalidArgumentError(self.op, f"input of {name}", "NaN or infinity", "finite values in the dense model")

    def _read_time(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        level = noise_level(root, args, kwargs)
        self._level = math.nan if level is None else level

    def _read(self, name: str, x: Tensor) -> None:
        if self.layers[name].dense_step:
            return  # nothing to make up for
        known = self._leader.get(name)
        if known is None and name not in self.postponed:
            self._meet(name, x)
        elif known is not None and name == next(iter(known.layers)):
            self._keep(known, x)

    def _meet(self, name: str, x: Tensor) -> None:
        """First call of a layer: find out whose input it reads, or make room for a new one."""
        layer = self.layers[name]
        for other, version, input in self._recent:
            if _same(other, x) and version == _version(x):
                if input is None:
                    self.postponed.add(name)
                else:
                    input.layers[name] = layer
                    self._leader[name] = input
                return
        size = x.element_size()
        capacity = capacity_within(layer.in_features, self.budget.tokens_per_channel, size, self.budget.memory)
        capacity = math.ceil(capacity / self.processes.count)
        needed = capacity * layer.in_features * size
        if needed > self._left and self.inputs:
            self.postponed.add(name)
            self._recent.append((x, _version(x), None))
            return
        self._left -= needed
        rank = self.processes.rank  # which draws its own tokens, the first one those it would draw alone
        reservoir = Reservoir(
            capacity, layer.in_features, x.dtype, self.budget.device, seed_of(self.seed, f"{name}@{rank}" if rank else name)
        )
        input = _Watched({name: layer}, reservoir, torch.ones((), dtype=torch.bool, device=x.device))
        self.inputs.append(input)
        self._leader[name] = input
        self._recent.append((x, _version(x), input))
        self._keep(input, x)

    def _keep(self, input: _Watched, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        input.finite &= rows.sum(dtype=torch.float32).isfinite()  # not read here: that would wait for the device
        input.reservoir.add(rows, input.calls, self._level)
        input.calls += 1


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that both exist now are the same memory read the same way."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype)


def _version(x: Tensor) -> int:
    """Grows with every change in place; inference tensors do not count theirs."""
    return 0 if x.is_inference() else x._version


@contextmanager
def all_dense(layers: Mapping[str, SparseLinear]) -> Iterator[None]:
    """Inside the block every layer computes densely, in eager mode and without gradients; afterwards as before.

    What hooks see of its input is what it would select from.
    """
    before = {name: layer.dense for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.dense = True
        # Compiled code would not see hooks that were added after it was traced.
        set_stance: Callable[[str], AbstractContextManager[object]] | None = getattr(torch.compiler, "set_stance", None)
        with torch.no_grad(), shifted_though_dense(layers.values()), set_stance("force_eager") if set_stance else nullcontext():
            yield
    finally:
        for name, layer in layers.items():
            layer.dense = before[name]


def available_memory(device: torch.device) -> int:
    """Bytes that samples may take on ``device``: half of what is free on a GPU, a quarter of the machine's memory elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
