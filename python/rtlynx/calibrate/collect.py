"""Run the dense model and accumulate statistics of every sparse layer's input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm

from rtlynx.calibrate.statistics import LayerStatistics
from rtlynx.config import Branch
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear


def collect(
    layers: Mapping[str, SparseLinear],
    branch: Branch,
    runs: Sequence[Callable[[], object]],
    *,
    max_tokens: int,
    seeds: Mapping[str, int],
    bar: tqdm[Any],
) -> dict[str, LayerStatistics]:
    """Statistics of ``layers`` over all ``runs`` of the model, which must be dense while they last (`all_dense`).

    Args:
        layers: Name → layer.
        branch: What the branch to fit will read.
        runs: Callables that each run the model once; the results are dropped.
        max_tokens: Tokens sampled from one call of a layer at most.
        seeds: Name → seed of the layer's sampling.
        bar: Progress bar, advanced once per run.

    Raises:
        InvalidArgumentError: A layer's input was not finite.
    """
    statistics = {name: LayerStatistics(layer, branch, max_tokens, seeds[name]) for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_observing(layer, statistics[name]))
        for run in runs:
            run()
            for name, layer_statistics in statistics.items():
                if not layer_statistics.finite():
                    raise InvalidArgumentError("calibrate", f"input of {name}", "NaN or infinity", "finite values in the dense model")
            bar.update()
    return statistics


@contextmanager
def all_dense(layers: Mapping[str, SparseLinear]) -> Iterator[None]:
    """Inside the block every layer computes densely, in eager mode and without gradients; afterwards as before."""
    before = {name: layer.dense for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.dense = True
        # Compiled code would not see hooks that were added after it was traced.
        set_stance: Callable[[str], AbstractContextManager[object]] | None = getattr(torch.compiler, "set_stance", None)
        with torch.no_grad(), _full_precision(), set_stance("force_eager") if set_stance else nullcontext():
            yield
    finally:
        for name, layer in layers.items():
            layer.dense = before[name]


def passes(layers: Mapping[str, SparseLinear], branch: Branch, memory: int) -> list[dict[str, SparseLinear]]:
    """Split the layers, in order, into groups whose statistics fit in memory at once; the model runs once for each group.

    Args:
        layers: Name → layer.
        branch: What the branch to fit will read.
        memory: Bytes; a layer that needs more forms a group alone.
    """
    groups: list[dict[str, SparseLinear]] = [{}]
    used = 0
    for name, layer in layers.items():
        needed = LayerStatistics.bytes_needed(layer, branch)
        if groups[-1] and used + needed > memory:
            groups.append({})
            used = 0
        groups[-1][name] = layer
        used += needed
    return groups


def available_memory(device: torch.device) -> int:
    """Bytes that statistics may take on ``device``: half of what is free on a GPU, a quarter of the machine's memory elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


@contextmanager
def _observing(layer: SparseLinear, statistics: LayerStatistics) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda _, args: statistics.add(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products without TF32, whatever the user chose: sums of squares over thousands of tokens need the bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
