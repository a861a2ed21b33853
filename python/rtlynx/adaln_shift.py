"""Selection without adaLN's shift: ``SparsityConfig(adaln_shift=True)``.

A block reads X = LN(h)(1 + scale) + shift, with a scale and a shift for every sample and step. Layers that read it then select from
X - shift, and shift · Wᵀ, one product of a vector per sample, is added to what they give::

    Y = [s · S(X - shift - m) Wᵀ + Z · comp_down · comp_upᵀ + bias + comp_bias] + shift · Wᵀ

where the Lloyd shift m and Z, which is of X - shift, are fitted to what is left. Which layer makes the shift, and who reads it, the recipe
says (`rtlynx.recipes.recipe.Modulation`). Any vector would leave the dense function as it is, so a shift that an adapter has changed since
costs a little accuracy and nothing else.

Hooks around the layers do it; fused blocks call those layers as they are, hooks and all. In eager code without gradients the hooks leave
it to the layer, whose selection takes the shift away as it reads X, and which adds shift · Wᵀ with its bias where all tokens are of one
sample (`ShiftReader.output`). Elsewhere both are passes of their own, which compiled code fuses with their neighbours. What a modulation
layer has made is known while its block runs. A layer that is called alone, as by calibration, is given what is shifted already: no shift is
known to be part of that, unless `shift_in_input` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from rtlynx.select_normed import select_normed

logger = logging.getLogger("rtlynx")

_INSTALLED = "rtlynx_adaln_shift"
"""The attribute of the model that holds its hooks."""


def install_adaln_shift(root: nn.Module, enabled: bool) -> None:
    """Let the sparse layers of ``root`` that adaLN feeds select without its shift, or none of them; call it when layers were replaced."""
    installed = root.__dict__.pop(_INSTALLED, None)
    if installed is not None:
        installed.remove()
    if enabled:
        root.__dict__[_INSTALLED] = _Installed(root)
        if not adaln_layers(root):
            logger.warning("adaln_shift: no sparse layer of %s reads a shift of adaLN", type(root).__name__)


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
    return {name: layers[name] for *_, readers in _modulations(root) for names in readers.values() for name in names if name in layers}


def follow_adaln_shift(layer: SparseLinear, fused: SparseLinear) -> None:
    """Let ``fused``, which stands for ``layer`` and others that read what it reads, do as it does."""
    if layer.shift_reader is not None:
        layer.shift_reader.attach(fused)


@contextmanager
def shifted_though_dense(layers: Iterable[SparseLinear]) -> Iterator[None]:
    """Inside the block dense layers are called with what they would select from, too: calibration reads that from hooks of its own."""
    readers = [layer.shift_reader for layer in layers if layer.shift_reader is not None]
    before = [reader.though_dense for reader in readers]
    try:
        for reader in readers:
            reader.though_dense = True
        yield
    finally:
        for reader, was in zip(readers, before, strict=True):
            reader.though_dense = was


@contextmanager
def shift_in_input(layers: Iterable[SparseLinear], shift: Tensor) -> Iterator[None]:
    """Inside the block ``shift`` is known to be part of what ``layers`` are called with, as it is while the block of the model runs.

    For who calls layers alone, but with all that is done around them; ``x - shift`` of one x is made once until the end. Layers that read
    no shift of adaLN compute as ever. Not for use while the model runs, whose blocks have shifts of their own.

    Args:
        layers: Called with the same x ``(samples, tokens, K)``.
        shift: ``(samples, K)``, of x's dtype.
    """
    known = {layer.shift_reader.shifts for layer in layers if layer.shift_reader is not None}
    try:
        for shifts in known:
            shifts.now = (shift,) * shifts.parts
        yield
    finally:
        for shifts in known:
            shifts.forget()


class _Installed:
    """The hooks of one model. No closures: a copied or unpickled model has its own."""

    def __init__(self, root: nn.Module) -> None:
        self.handles: list[RemovableHandle] = []
        self.readers: list[ShiftReader] = []
        layers = sparse_layers(root)
        for modulation, block, producer, readers in _modulations(root):
            found = [(part, layers[name]) for part, names in readers.items() for name in names if name in layers]
            if not found:
                continue
            shifts = _Shifts(modulation.parts)
            producer = getattr(producer, "base_layer", producer)  # adapters come and go, and take hooks on what they wrap it in along
            self.handles.append(producer.register_forward_hook(shifts.remember))
            self.handles.append(block.register_forward_hook(shifts.forget, always_call=True))
            for part, layer in found:
                self.readers.append(ShiftReader(shifts, part))
                self.readers[-1].attach(layer)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for reader in self.readers:
            reader.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": _alive(self.handles)}


class _Shifts:
    """What one modulation layer has made in the present call of its block."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.now: tuple[Tensor, ...] = ()
        self.last: tuple[Tensor, Tensor] | None = None  # an input, and that without its shift
        self.norm: tuple[Tensor, Tensor, Tensor] | None = None  # a shift, and what takes it away as a norm
        self.left_to_layer: ShiftReader | None = None  # whose layer is to ask for its output in the call that runs

    def remember(self, producer: nn.Module, args: object, modulation: Tensor) -> None:
        self.now = modulation.chunk(self.parts, -1) if modulation.dim() == 2 else ()
        self.last = self.norm = None

    def forget(self, *_: object) -> None:
        """At the block's end: nothing stays in memory, and compiled blocks do not return it."""
        self.now, self.last, self.norm, self.left_to_layer = (), None, None, None

    def of(self, part: int, x: Tensor) -> Tensor | None:
        """The shift that is part of x; None where none is known to be."""
        shift = self.now[part] if self.now else None
        return shift if shift is not None and x.dim() == 3 and x.shape[::2] == shift.shape else None

    def without(self, x: Tensor, shift: Tensor) -> Tensor:
        """``x - shift``, of the same x the same tensor, so that layers which share a selection still do."""
        if self.last is None or self.last[0] is not x:
            self.last = x, x - shift.unsqueeze(1)
        return self.last[1]

    def as_norm(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics and bias of the norm of x that is ``x - shift``, of the same shift the same tensors, for the same reason."""
        if self.norm is None or self.norm[0] is not shift or len(self.norm[1]) != x.shape[0] * x.shape[1]:
            mean_0_rstd_1 = torch.full((x.shape[0] * x.shape[1],), 1j, dtype=torch.complex64, device=x.device)
            self.norm = shift, torch.view_as_real(mean_0_rstd_1), -shift
        return self.norm[1:]


class ShiftReader:
    """The hooks around one layer, and around the one it may be fused into.

    Attributes:
        shifts: What is known of the shifts of the layer's block.
        though_dense: See `shifted_though_dense`.
    """

    def __init__(self, shifts: _Shifts, part: int) -> None:
        self.though_dense = False
        self.shifts, self._part = shifts, part
        self._taken: Tensor | None = None  # from the input of the call that runs
        self._layers: list[SparseLinear] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, layer: SparseLinear) -> None:
        """Act around ``layer``."""
        layer.shift_reader = self
        self._layers.append(layer)
        self._handles += layer.register_forward_pre_hook(self._take, with_kwargs=True), layer.register_forward_hook(self._give_back)

    def detach(self) -> None:
        """Act around no layer any more."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.shift_reader = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": _alive(self._handles)}

    def _take(self, layer: SparseLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x: Tensor = args[0] if args else kwargs["input"]
        # A dense layer's output is that of the dense model, to the bit.
        dense = layer.dense_step or (layer.is_dense_now(x.shape[:-1].numel(), x.device) and not self.though_dense)
        self._taken = None if dense else self.shifts.of(self._part, x)
        if self._taken is None:
            return None
        if self._layer_can(layer, x):
            self.shifts.left_to_layer = self
            return None
        x = self.shifts.without(x, self._taken)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

    @property
    def left_to_layer(self) -> bool:
        """Whether the shift is still part of the input of the call that runs, for the layer to ask for its `output`."""
        return self.shifts.left_to_layer is self

    @staticmethod
    def _layer_can(layer: SparseLinear, x: Tensor) -> bool:
        # Not for who watches inputs: calibration and others want what is selected from.
        alone = len(layer._forward_pre_hooks) == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return alone and layer.takes_norm(x.shape[:-1].numel(), x.device)

    def output(self, layer: SparseLinear, x: Tensor) -> Tensor:
        """What ``layer`` gives for x in the call that is `left_to_layer`: to be asked once, within its `forward`."""
        assert self._taken is not None
        shift, self._taken, self.shifts.left_to_layer = self._taken, None, None
        stats, bias = self.shifts.as_norm(x, shift)
        selected = select_normed(layer, x, stats, None, bias)
        return layer.multiply(selected, x.dtype, x.shape[:-1], shift=shift)

    def _give_back(self, layer: SparseLinear, args: object, output: Tensor) -> Tensor | None:
        shift, self._taken = self._taken, None
        if self.left_to_layer:  # something else than the layer's `forward` has served the call, and had the whole input
            self.shifts.left_to_layer = None
            return None
        return None if shift is None else output + _product(layer, shift).unsqueeze(1)


def _alive(handles: list[RemovableHandle]) -> list[RemovableHandle]:
    """Those of modules that are still there: torch copies no others."""
    return [handle for handle in handles if handle.hooks_dict_ref() is not None]


def _product(layer: SparseLinear, rows: Tensor) -> Tensor:
    """``rows · Wᵀ`` by the layer itself, since only in a call of it an offloaded weight is there; a row of zeros tells its bias."""
    dense, layer.dense = layer.dense, True
    try:
        product = layer.forward(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))  # without its hooks
    finally:
        layer.dense = dense
    return product[:-1] - product[-1:]


def _modulations(root: nn.Module) -> Iterator[tuple[Modulation, nn.Module, nn.Module, dict[int, list[str]]]]:
    """What the recipe says, for every block that is as it says: the modulation, block, layer, and who reads each shift, by full name."""
    known = find_recipe(root).modulations
    for name, block in root.named_modules() if known else ():
        asked = [modulation for modulation in known if name and first_match(name, modulation.blocks) is not None]
        modules = dict(block.named_modules()) if asked else {}
        for modulation in asked:
            producer = modules.get(modulation.layer)
            readers = {part: [reader for reader in names if reader in modules] for part, names in modulation.read_by}
            first = next((modules[reader] for names in readers.values() for reader in names), None)
            channels = getattr(first, "in_features", None)
            if producer is not None and channels and getattr(producer, "out_features", 0) == modulation.parts * channels:
                yield modulation, block, producer, {part: [f"{name}.{reader}" for reader in names] for part, names in readers.items()}
