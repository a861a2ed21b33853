"""Selection without adaLN's shift: ``SparsityConfig(adaln_shift=True)``.

A block reads X = LN(h)(1 + scale) + shift, with a scale and a shift for every sample and step. Layers that read it then select from
X - shift, and shift · Wᵀ, one product of a vector per sample, is added to what they give::

    Y = [s · S(X - shift - m) Wᵀ + Z · comp_down · comp_upᵀ + bias + comp_bias] + shift · Wᵀ

where the Lloyd shift m and Z, which is of X - shift, are fitted to what is left. Which layer makes the shift, and who reads it, the recipe
says (`rtlynx.recipes.recipe.Modulation`). Any vector would leave the dense function as it is, so a shift that an adapter has changed since
costs a little accuracy and nothing else.

Hooks around the layers do it, in passes of their own; fused blocks call those layers as they are, hooks and all. They act while the model
runs: a layer that is called alone, as calibration does, is given an input that is shifted already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rtlynx.config import SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.errors import InvalidArgumentError
from rtlynx.linear import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipes import find_recipe
from rtlynx.recipes.recipe import Modulation

_INSTALLED = "rtlynx_adaln_shift"
"""The attribute of the model that holds its hooks."""


def install_adaln_shift(root: nn.Module, enabled: bool) -> None:
    """Let the sparse layers of ``root`` that adaLN feeds select without its shift, or none of them; call it when layers were replaced."""
    installed = root.__dict__.pop(_INSTALLED, None)
    if installed is not None:
        installed.remove()
    if enabled:
        root.__dict__[_INSTALLED] = _Installed(root)


def check_adaln_shift(root: nn.Module, config: SparsityConfig) -> None:
    """Refuse it for a model in which nobody knows where a shift comes from.

    Raises:
        InvalidArgumentError: The model's recipe names no modulation of its blocks.
    """
    if config.adaln_shift and next(_modulations(root), None) is None:
        got = f"adaln_shift=True for {type(root).__name__}"
        raise InvalidArgumentError("apply", "config", got, "a model whose recipe says where the shifts of its blocks come from")


def adaln_layers(root: nn.Module) -> dict[str, SparseLinear]:
    """Name → the sparse layers of ``root`` that read what a shift of adaLN was added to."""
    layers = sparse_layers(root)
    return {name: layers[name] for _, _, readers in _modulations(root) for names in readers.values() for name in names if name in layers}


def follow_adaln_shift(layer: SparseLinear, fused: SparseLinear) -> None:
    """Let ``fused``, which stands for ``layer`` and others that read what it reads, do as it does."""
    if layer.adaln_reader is not None:
        layer.adaln_reader.attach(fused)


class _Installed:
    """The hooks of one model, and whether it runs now. No closures: a copied or unpickled model has its own."""

    def __init__(self, root: nn.Module) -> None:
        self.running = False
        self.handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(self.begin),
            root.register_forward_hook(self.end, always_call=True),
        ]
        self.shifts: list[_Shifts] = []
        self.readers: list[_Reader] = []
        layers = sparse_layers(root)
        for modulation, producer, readers in _modulations(root):
            shifts = _Shifts(self, modulation.parts)
            self.shifts.append(shifts)
            self.handles.append(producer.register_forward_hook(shifts.remember))
            for part, names in readers.items():
                for layer in (layers[name] for name in names if name in layers):
                    self.readers.append(_Reader(shifts, part))
                    self.readers[-1].attach(layer)

    def begin(self, *_: Any) -> None:
        self.running = True

    def end(self, *_: Any) -> None:
        self.running = False
        for shifts in self.shifts:  # their tensors need not wait for the next step
            shifts.now, shifts.last = (), None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for reader in self.readers:
            reader.detach()


class _Shifts:
    """What one modulation layer has made in the present call of the model."""

    def __init__(self, model: _Installed, parts: int) -> None:
        self.model, self.parts = model, parts
        self.now: tuple[Tensor, ...] = ()
        self.last: tuple[Tensor, Tensor] | None = None  # an input, and that without its shift

    def remember(self, producer: nn.Module, args: object, modulation: Tensor) -> None:
        self.now = modulation.chunk(self.parts, -1) if self.model.running and modulation.dim() == 2 else ()
        self.last = None

    def of(self, part: int, x: Tensor) -> Tensor | None:
        """The shift that is part of x; None where none is known to be."""
        shift = self.now[part] if self.now else None
        return shift if shift is not None and x.dim() == 3 and x.shape[::2] == shift.shape else None

    def without(self, x: Tensor, shift: Tensor) -> Tensor:
        """``x - shift``, of the same x the same tensor, so that layers which share a selection still do."""
        if self.last is None or self.last[0] is not x:
            self.last = x, x - shift.unsqueeze(1)
        return self.last[1]


class _Reader:
    """The hooks around one layer, and around the one it may be fused into."""

    def __init__(self, shifts: _Shifts, part: int) -> None:
        self.shifts, self.part = shifts, part
        self.taken: Tensor | None = None  # from the input of the call that runs
        self.in_dense = False  # set while calibration, for which layers are dense, reads what they would select from
        self.layers: list[SparseLinear] = []
        self.handles: list[RemovableHandle] = []

    def attach(self, layer: SparseLinear) -> None:
        layer.adaln_reader = self
        self.layers.append(layer)
        self.handles += layer.register_forward_pre_hook(self.take), layer.register_forward_hook(self.give_back)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.adaln_reader = None

    def take(self, layer: SparseLinear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        dense = layer.dense_step or (layer.dense and not self.in_dense)  # the dense layer's, to the bit
        self.taken = None if dense else self.shifts.of(self.part, args[0])
        return None if self.taken is None else (self.shifts.without(args[0], self.taken), *args[1:])

    def give_back(self, layer: SparseLinear, args: object, output: Tensor) -> Tensor | None:
        shift, self.taken = self.taken, None
        return None if shift is None else output + _product(layer, shift).unsqueeze(1)


def _product(layer: SparseLinear, rows: Tensor) -> Tensor:
    """``rows · Wᵀ`` by the layer itself, since only in a call of it an offloaded weight is there; a row of zeros tells its bias."""
    dense, layer.dense = layer.dense, True
    try:
        product = layer.forward(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))  # without its hooks
    finally:
        layer.dense = dense
    return product[:-1] - product[-1:]


def _modulations(root: nn.Module) -> Iterator[tuple[Modulation, nn.Module, dict[int, list[str]]]]:
    """What the recipe says of modulations, for every block that is as it says: the layer, and of each shift who reads it, by full name."""
    for name, block in root.named_modules():
        for modulation in find_recipe(root).modulations:
            if first_match(name or "-", modulation.blocks) is None:
                continue
            modules = dict(block.named_modules())
            producer = modules.get(modulation.layer)
            readers = {part: [reader for reader in names if reader in modules] for part, names in modulation.read_by}
            first = next((modules[reader] for names in readers.values() for reader in names), None)
            channels = getattr(first, "in_features", None)
            if producer is not None and channels and getattr(producer, "out_features", 0) == modulation.parts * channels:
                yield modulation, producer, {part: [f"{name}.{reader}" for reader in names] for part, names in readers.items()}
