"""What is chosen between: units of layers, and the options of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Cache, Fit, Tensors, fit_input
from rtlynx.linear import SparseLinear

Option = int | None
"""None: dense. Otherwise the rank of the branch, 0 without one."""

_KEPT_TOKENS = 256


def label(option: Option) -> str:
    """``"dense"``, ``"sparse"`` or ``"sparse, rank 64"``."""
    return "dense" if option is None else f"sparse, rank {option}" if option else "sparse"


@dataclass(frozen=True)
class Unit:
    """Layers that select from one input together, so that they are decided together.

    Attributes:
        layers: Name → layer.
        fitted: Rank → what was fitted, by layer.
        tokens: ``(T, K)`` on the CPU, some of what they select from, to time them on; None where nobody has read any.
    """

    layers: dict[str, SparseLinear]
    fitted: dict[int, dict[str, Tensors]]
    tokens: Tensor | None = None

    @property
    def name(self) -> str:
        """The first layer's name."""
        return next(iter(self.layers))

    def choose(self, option: Option) -> None:
        """Let the layers compute as ``option`` says."""
        for name, layer in self.layers.items():
            layer.dense = option is None
            layer.set_compensation(**({} if option is None else self.fitted[option][name]))


@torch.no_grad()
def fit_units(inputs: Iterable[LayerInput], fit: Fit, ranks: Sequence[int], device: torch.device) -> Iterator[list[Unit]]:
    """Fit all ranks to every input, and give its units; of its samples no more than a few tokens are needed then."""
    for input in inputs:
        x = input.samples.x
        tokens = x[:: max(1, -(-len(x) // _KEPT_TOKENS))].to("cpu", copy=True)  # of all steps
        cache: Cache = {}  # one selection and its moments serve all ranks
        fitted = {rank: dict(fit_input(input, replace(fit, rank=rank), device, cache)) for rank in ranks}
        yield [
            Unit(layers, {rank: {name: found[name] for name in layers} for rank, found in fitted.items()}, tokens)
            for layers in together(input.layers)
        ]


def together(layers: Mapping[str, SparseLinear]) -> list[dict[str, SparseLinear]]:
    """Layers by what is decided for all of them: those that may share a selection."""
    groups: dict[object, dict[str, SparseLinear]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer if layer.input_group is None else layer.input_group, {})[name] = layer
    return list(groups.values())


@contextmanager
def chosen(units: Sequence[Unit], choice: Sequence[Option]) -> Iterator[None]:
    """Inside the block the units compute as chosen; afterwards they are dense."""
    try:
        for unit, option in zip(units, choice, strict=True):
            unit.choose(option)
        yield
    finally:
        for unit in units:
            unit.choose(None)
