"""Sparse layers that read one tensor select from it once.

Which layers these are the recipe says (`Recipe.shared_inputs`): q, k and v, the gate and up projections of an MLP. To share, the layers of
a group must ask for the same selection: they score channels by their stacked weights, and hold equal `comp_down` and `shift` as one object.
A layer that holds another one selects for itself.

In eager mode an `InputGroup` keeps the last selection for the layers that still have to read it; compiled graphs are `rtlynx.inductor`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rtlynx.eligibility import sparse_layers
from rtlynx.errors import InvalidArgumentError
from rtlynx.fused_projections import parts_of
from rtlynx.layer_state import same_selection
from rtlynx.recipes import find_recipe

if TYPE_CHECKING:
    from rtlynx.layer_state import LayerState

T = TypeVar("T")


def share_inputs(root: nn.Module, enabled: bool = True) -> list[LayerState]:
    """Put the sparse layers of a model into the groups its recipe names, or into none; call it when layers were added or removed.

    Returns:
        The layers that were in a group and are in none now; their scores are still those of the stacked weights.
    """
    layers = sparse_layers(root)
    grouped = [layer for layer in layers.values() if layer.input_group is not None]
    suffixes = [(f".{member}", i) for i, group in enumerate(find_recipe(root).shared_inputs) for member in group]
    found: dict[tuple[str, int], list[LayerState]] = {}
    if not enabled:
        _untie(list(layers.values()))
    for name, layer in layers.items():
        parts = parts_of(name)
        layer.input_group, layer.sharing, layer.repeats = None, 1, any(part in layers for part in parts)
        name = f".{parts[0] if parts else name}"
        for suffix, i in suffixes if enabled else ():
            if name.endswith(suffix):
                found.setdefault((name.removesuffix(suffix), i), []).append(layer)
    for members in found.values():
        group = InputGroup()
        for member in members:
            group.join(member)
        members[0].update_score()
    return [layer for layer in grouped if layer.input_group is None]


_IN_COMMON = ("permutation", "places", "comp_down", "shift", "score")
"""What layers of a group hold as one object where it is equal."""


def _untie(layers: list[LayerState]) -> None:
    """Give every layer its own of what it holds in common with others."""
    seen: set[int] = set()
    for layer in layers:
        for name in _IN_COMMON:
            tensor: Tensor | None = getattr(layer, name)
            if tensor is not None and id(tensor) in seen:
                own = tensor.detach().clone()
                setattr(layer, name, nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own)
            seen.add(id(tensor))


class InputGroup:
    """The sparse layers that read one tensor, and the last selection from it.

    A selection is kept until every layer has read it or its input is gone, whichever is first.
    """

    __slots__ = ("_kept", "_layers")

    def __init__(self) -> None:
        self._layers: list[weakref.ref[LayerState]] = []
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[InputGroup], tuple[()]]:
        # Copied or unpickled with its layers it starts empty, and they join it (LayerState.__setstate__).
        return InputGroup, ()

    def join(self, layer: LayerState) -> None:
        """Make ``layer`` one of the group."""
        layer.input_group = self
        self._layers.append(weakref.ref(layer))
        self._count()

    def layers(self) -> list[LayerState]:
        """The layers that are still there and still in the group."""
        return [layer for layer in (ref() for ref in self._layers) if layer is not None and layer.input_group is self]

    def before(self, layer: LayerState) -> list[LayerState]:
        """The layers that joined before ``layer``."""
        layers = self.layers()
        return layers[: layers.index(layer)]

    def tie(self) -> None:
        """Let the layers hold equal tensors as one object: only then can one selection serve them.

        What counts is the values, so that it does not matter how the layers got them: from calibration, from a file, one by one.
        """
        layers = self.layers()
        for name in _IN_COMMON:
            held: list[Tensor] = []
            for layer in layers:
                tensor: Tensor | None = getattr(layer, name)
                if tensor is None or any(tensor is other for other in held):
                    continue
                twin = next((other for other in held if _equal(tensor, other)), None)
                if twin is None:
                    held.append(tensor)
                else:
                    setattr(layer, name, twin)
        self._count()

    def _count(self) -> None:
        layers = self.layers()
        asked = [layer.selection_inputs() for layer in layers]
        for layer, mine in zip(layers, asked, strict=True):
            layer.sharing = sum(same_selection(mine, other) for other in asked)

    def select(self, reader: LayerState, source: Tensor, select: Callable[[Tensor], T], *norm: Tensor | None) -> T:
        """What was selected from ``source``: the selection that is kept if it serves this reader, else a new one.

        A kept selection serves each reader once, and only one that comes with the same tensor object, not written to since, and asks for
        the same selection on the same stream.

        Args:
            reader: The layer that asks.
            source: The tensor it was called with.
            select: Makes the selection.
            norm: What else it is made from: statistics, weight and bias of the norm before it.
        """
        asked = *reader.selection_inputs(), *norm
        state = _state(source, asked)
        if state is None:
            _refuse_moving_ahead(reader)
            return select(source)
        # The same objects, since comparing tensors would cost more than selecting.
        key = *(id(item) if isinstance(item, Tensor) else item for item in asked), *state
        return self.once(reader, source, key, select, asked)

    def once(
        self, reader: LayerState, source: Tensor, key: tuple[object, ...], select: Callable[[Tensor], T], alive: tuple[object, ...] = ()
    ) -> T:
        """The same for who knows himself when a selection is the same.

        Args:
            reader, source, select: As above.
            key: What equals that of another reader, and of this one in the next call, exactly if the selection is the same.
            alive: What has to be there as long as the selection is kept, for `key` to mean something.
        """
        _refuse_moving_ahead(reader)
        kept = self._kept
        if kept is not None and kept.source() is source and kept.key == key and id(reader) not in kept.readers:
            kept.readers.add(id(reader))
            if len(kept.readers) >= reader.sharing:
                self._kept = None
            return kept.selection  # type: ignore[return-value]  # one key, so one kind of selection
        selection = select(source)
        self._kept = _Kept(weakref.ref(source, self._forget), key, alive, selection, {id(reader)})
        return selection

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept.source is source:
            self._kept = None


class _Kept(NamedTuple):
    """A selection, and what it was made from."""

    source: weakref.ref[Tensor]
    key: tuple[object, ...]
    alive: tuple[object, ...]
    selection: object
    readers: set[int]


def _refuse_moving_ahead(layer: LayerState) -> None:
    """Refuse diffusers' group offloading of single layers on a stream.

    It would fill what the next layer holds in common with this one while this one still reads it. `rtlynx.offloading` sees to it that
    nothing is shared where the model's own method set it up; only who called diffusers' function comes here.
    """
    if "_diffusers_hook" not in layer.__dict__:
        return
    hook = layer._diffusers_hook.get_hook("group_offloading")  # type: ignore[operator, union-attr]
    if hook is not None and hook.group.stream is not None:
        got = 'offload_type="leaf_level" with use_stream=True'
        raise InvalidArgumentError("SparseLinear", "offloading", got, "a model applied with SparsityConfig(share_inputs=False)")


def _state(source: Tensor, asked: tuple[object, ...]) -> tuple[int, ...] | None:
    """What changes when a selection of the same objects may no longer be the same, or None where that cannot be known.

    Every write that torch sees raises a tensor's version, except under ``torch.inference_mode``. Work on another stream would have to wait;
    what a CUDA graph is being captured of is not there outside of it. With gradients, a selection kept would keep the graph behind it.
    """
    if torch.is_grad_enabled() or type(source) is not Tensor or source.is_inference():
        return None
    state = [source._version]
    for item in asked:
        if isinstance(item, Tensor):
            if item.is_inference():
                return None
            state.append(item._version)
    if source.is_cuda:
        state += torch._C._cuda_getCurrentRawStream(source.get_device()), torch.cuda.is_current_stream_capturing()
    return tuple(state)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same kind and place have the same values."""
    alike = type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and a.requires_grad == b.requires_grad and not a.is_meta and torch.equal(a, b)
