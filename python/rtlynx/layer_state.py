"""What a sparse layer holds: made from the weight, moved, copied, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rtlynx.config import Branch, Precision, Selection, SmallM
from rtlynx.derived import Derived
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import check_values_scale, quantize_weight
from rtlynx.layer_shapes import bias_shape, branch_problem
from rtlynx.layerwise_casting import computable, in_8_bits
from rtlynx.reference import E4M3, EPS, places_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from rtlynx.sharing import InputGroup

_COMPENSATION = ("comp_down", "comp_up", "comp_bias", "sparse_weight", "shift", "permutation")
"""The tensors calibration adds to a layer; absent from its state dict until then."""
_OWN_DTYPES = ("shift", "score", "weight_fp8", "weight_scale", "compact_scale", "compact_values_scale")
"""Floating-point buffers that a cast of the model leaves as they are."""
_PREPARED = ("places", "score", "weight_fp8", "weight_scale", "output_bias")
"""Buffers that are made from the others, and not saved; but for a compact layer's score: there is nothing to make it from."""
_ADDED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of biases that can be added: not those in which layerwise casting stores them."""
SelectionInputs = tuple[Any, ...]
"""What `LayerState.selection_inputs` returns: tensors, None, and plain values."""


class LayerState(nn.Linear):
    """The tensors of a `SparseLinear`, which says what they are, and what keeps them together.

    Some are parameters, which are fitted and saved; some are prepared from the weight, and are made again instead.
    """

    comp_down: nn.Parameter | None
    comp_up: nn.Parameter | None
    comp_bias: nn.Parameter | None
    sparse_weight: nn.Parameter | None
    shift: Tensor | None
    permutation: Tensor | None
    places: Tensor | None
    score: Tensor | None
    weight_fp8: Tensor | None
    weight_scale: Tensor | None
    output_bias: Tensor | None
    compact_scale: Tensor | None
    compact_values_scale: Tensor | None
    compact_fitted: Tensor | None
    branch: Branch
    selection: Selection
    norm_compensation: bool
    small_m: SmallM
    precision: Precision
    input_group: InputGroup | None
    sharing: int
    repeats: bool
    derived: Derived | None
    bias_group: Tensor | None
    _values_scale: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.input_group = self.derived = None
        self.sharing = 1
        self.repeats = False
        self.comp_down = self.comp_up = self.comp_bias = self.sparse_weight = None
        self.register_buffer("shift", None)
        self.register_buffer("permutation", None)
        self.register_buffer("compact_scale", None)
        self.register_buffer("compact_values_scale", None)
        self.register_buffer("compact_fitted", None)
        self._compact_dtype: torch.dtype | None = None
        self._output_bias_of: tuple[object, ...] = ()
        self.discard_prepared()
        self._values_scale = 1.0

    @property
    def rank(self) -> int:
        """Rank of the branch; 0 without one."""
        comp_down = self.comp_down
        return 0 if comp_down is None else comp_down.shape[1]

    @property
    def bias_groups(self) -> int:
        """How many groups of timesteps have a `comp_bias` of their own; 1 where one serves all, 0 without one."""
        comp_bias = self.comp_bias
        return 0 if comp_bias is None else comp_bias.shape[0] if comp_bias.dim() == 2 else 1

    @property
    def is_compact(self) -> bool:
        """Whether its weight is the e4m3 one and there is no other (`rtlynx.compact`)."""
        return self._buffers["compact_scale"] is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of its input and output, which is not that of a compact layer's weight; peft gives this one to adapters."""
        if self._buffers["compact_scale"] is None or self._compact_dtype is None:
            return self.weight.dtype
        bias = self.bias
        return self._compact_dtype if bias is None else bias.dtype

    def computes_in(self, dtype: torch.dtype) -> None:
        """Take ``dtype`` for the `compute_dtype` of a compact layer without a bias: its weight does not tell it."""
        self._compact_dtype = dtype

    def take_values_scale(self) -> None:
        """Use the scale of the values that was loaded with a compact layer's weight.

        Raises:
            InvalidArgumentError: It is no power of two.
        """
        loaded = self.compact_values_scale
        if loaded is not None and not loaded.is_meta:
            check_values_scale("load_state_dict", float(loaded))
            self._values_scale = float(loaded)

    def become_compact(self, fitted: bool) -> None:
        """Let the e4m3 copy be the weight, in the same memory, and hold no other; `rtlynx.compact` decides for which layers that is right.

        A layer without the copy gets room for one, to be loaded into.

        Args:
            fitted: Whether the copy is that of a weight which was fitted for the sparse product, and says nothing of the dense one.
        """
        weight, scale = self.weight_fp8, self.weight_scale
        if weight is None or scale is None:
            weight, scale = torch.empty_like(self.weight, dtype=E4M3), self.weight.new_empty(self.out_features, dtype=torch.float32)
        self._compact_dtype = self.weight.dtype
        self.weight, self.sparse_weight = nn.Parameter(weight, requires_grad=False), None
        self.register_buffer("compact_scale", scale * self._values_scale)
        self.register_buffer("compact_values_scale", scale.new_full((1,), self._values_scale))
        self._mark_fitted(fitted)
        self._hold("weight_fp8", None)
        self.set_score(self.score)
        self.derived = None

    def _mark_fitted(self, fitted: bool) -> None:
        self.register_buffer("compact_fitted", self.weight.new_ones(1, dtype=torch.uint8) if fitted else None)

    def _tie(self) -> None:
        if self.input_group is not None:
            self.input_group.tie()

    # ---- what is prepared from the weight ------------------------------------------------------------------------------------------------

    def update_prepared(self) -> None:
        """Make everything anew that is made from the weight and not saved; ``load_state_dict`` calls this."""
        self.update_places()
        self.update_weight_fp8()
        self.update_score()
        self.update_output_bias()

    def discard_prepared(self) -> None:
        """Hold nothing of that, until `update_prepared`."""
        for name in _PREPARED:
            self._hold(name, None)

    def update_places(self) -> None:
        """Make `places` anew from the permutation, where selection can gather by it on the way."""
        permutation = self.permutation
        known = permutation is not None and not permutation.is_meta
        self._hold("places", places_of(permutation) if known else None)  # type: ignore[arg-type]

    @torch.no_grad()
    def update_weight_fp8(self) -> None:
        """Make `weight_fp8` and `weight_scale` anew from the weight; `rtlynx.refresh` does so for a model whose weights changed."""
        made: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.compact_scale is not None:
            made = None, self.compact_scale / self._values_scale
            self.compact_values_scale = self.compact_scale.new_full((1,), self._values_scale)
        elif self.precision == "fp8":
            made = quantize_weight(computable(self.weight if self.sparse_weight is None else self.sparse_weight), self._values_scale)
        for name, new in zip(("weight_fp8", "weight_scale"), made, strict=True):
            self._renew(name, new)

    @torch.no_grad()
    def update_output_bias(self) -> None:
        """Add `comp_bias` to `bias` once instead of with every call, which would be a kernel of its own. Not for groups of timesteps."""
        bias, comp_bias, total = self.bias, self.comp_bias, None
        if bias is not None and comp_bias is not None and comp_bias.dim() == 1 and all(map(_can_be_added, (bias, comp_bias))):
            total = bias + comp_bias
        self._renew("output_bias", total)
        self._output_bias_of = () if total is None else (bias, bias._version, comp_bias, comp_bias._version)  # type: ignore[union-attr]

    def added_bias(self) -> Tensor | None:
        """What is added to the output now beside the branch: ``bias + comp_bias``."""
        bias, comp_bias = self.bias, self.comp_bias
        if comp_bias is None:
            return bias
        if comp_bias.dim() == 2:
            comp_bias = self._bias_now(comp_bias)  # type: ignore[assignment]
        elif bias is not None and self._is_added(bias, comp_bias):
            return self._buffers["output_bias"]
        return comp_bias if bias is None else bias + comp_bias

    def _is_added(self, bias: nn.Parameter, comp_bias: nn.Parameter) -> bool:
        """Whether `output_bias` is their sum as they are now. Compiled code cannot see that they were written to: `rtlynx.refresh`."""
        if self._buffers["output_bias"] is None or (torch.is_grad_enabled() and (bias.requires_grad or comp_bias.requires_grad)):
            return False
        if torch.compiler.is_compiling():
            return True
        of, version, comp_of, comp_version = self._output_bias_of
        return of is bias and comp_of is comp_bias and version == bias._version and comp_version == comp_bias._version

    def _bias_now(self, comp_bias: Tensor) -> Tensor:
        """The row of a ``(G, N)`` bias for the present step; the first where nobody said which it is."""
        if self.bias_group is None:
            return comp_bias[0]
        return comp_bias.index_select(0, self.bias_group.to(comp_bias.device)).view(-1)

    def update_score(self) -> None:
        """Recompute `score` from the weight; `rtlynx.refresh` does it for a whole model after its weights changed.

        Layers that share their input share the score: the norms of their stacked weights' columns. It only ranks channels: a stale one
        costs a little accuracy, never correctness. A compact layer keeps the one it has, and the others take theirs from it.
        """
        if self.selection != "weight":
            self.set_score(None)
        else:
            layers = [self] if self.input_group is None else self.input_group.layers()
            layers = [layer for layer in layers if layer.selection == "weight" and layer.weight.device == self.weight.device]
            kept = next((layer for layer in (self, *layers) if layer.is_compact), None)
            norms = _column_norms(self, layers) if kept is None else _in_channel_order(kept)
            for layer in layers:
                if norms is not None and not layer.is_compact:
                    layer.set_score(norms if layer.permutation is None else norms[layer.permutation])
        self._tie()

    def set_score(self, score: Tensor | None) -> None:
        """Hold this score."""
        self._hold("score", score)

    def _hold(self, name: str, prepared: Tensor | None) -> None:
        # Where there is one it is a buffer that is not saved, which accelerate's offloading takes to be there.
        self.register_buffer(name, prepared, persistent=prepared is None or (name == "score" and self.is_compact))

    def _renew(self, name: str, prepared: Tensor | None) -> None:
        # Where there already is one it is overwritten, so that captured CUDA graphs follow.
        old: Tensor | None = getattr(self, name)
        if old is None or prepared is None or (old.device, old.dtype) != (prepared.device, prepared.dtype) or old.is_inference():
            self._hold(name, prepared)
        else:
            old.copy_(prepared)

    def selection_inputs(self) -> SelectionInputs:
        """All that its selection depends on but the input.

        The permutation that has to be gathered by before, the `places` by which selection gathers itself, then `rtlynx.ops.sparsify`'s
        arguments from `score` to `values_scale`. Of the first two at most one is not None.
        """
        branch_input = "input" if self.branch == "input" else "dropped"
        buffers = self._buffers  # read with every call, and three times as fast as attributes
        values = (E4M3, self._values_scale) if self.precision == "fp8" else (None, 1.0)
        places = buffers["places"]
        of_input = buffers["permutation"] if places is None else None, places, buffers["score"], buffers["shift"]
        return *of_input, self.comp_down, branch_input, self.norm_compensation, EPS, *values

    # ---- nn.Module -----------------------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` casts every floating-point buffer, but the kernels read these in dtypes of their own: redo those moves without.
        buffers = self._buffers
        before = {name: tensor for name in _OWN_DTYPES if (tensor := buffers.get(name)) is not None}
        if self._compact_dtype is not None:
            self._compact_dtype = fn(torch.empty(0, dtype=self._compact_dtype, device=self.weight.device)).dtype
        super()._apply(self._but_for_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = buffers.get(name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        if any(buffers.get(name) is not None for name in ("shift", "score", "permutation")):
            self._tie()  # a buffer that moved is another object
        if self._parameters.get("comp_bias") is not None:
            self.update_output_bias()
        return self

    def _but_for_dtype(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``fn``, which leaves some tensors in the dtype that they have.

        A compact layer's weight: not even for a moment is it cast, since that would take the memory again. And the compensation, which
        layerwise casting is not to round to 8 bits: it is small, makes up for what is rounded, and would be cast in every call.
        """
        parameters = self._parameters
        weight = parameters.get("weight") if self.is_compact else None
        small = [tensor for name in ("comp_down", "comp_up", "comp_bias") if (tensor := parameters.get(name)) is not None]
        like = fn(small[0].detach().new_empty(0)) if small else None
        if like is None or not in_8_bits(like):
            small = []
        if weight is None and not small:
            return fn

        def applied(tensor: Tensor) -> Tensor:
            if like is not None and any(tensor is each for each in small):
                return tensor.to(like.device)
            if tensor is not weight:
                return fn(tensor)
            of_weight = fn(tensor.detach().new_empty(0))
            return fn(tensor) if of_weight.dtype == tensor.dtype else tensor.to(of_weight.device)

        return applied

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__(), "_call": None}  # type: ignore[no-untyped-call]
        if self.weight_fp8 is not None:  # torch pickles no float8: its bytes
            state["_buffers"] = {**state["_buffers"], "weight_fp8": self.weight_fp8.view(torch.uint8)}
        if self.is_compact:
            in_bytes = nn.Parameter(self.weight.detach().view(torch.uint8), requires_grad=False)
            state["_parameters"] = {**state["_parameters"], "weight": in_bytes}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.weight_fp8 is not None:
            self._hold("weight_fp8", self.weight_fp8.view(E4M3))
        if self.is_compact:
            self.weight = nn.Parameter(self.weight.view(E4M3), requires_grad=False)
        if self.input_group is not None:
            self.input_group.join(self)
        self.update_output_bias()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._follow_compact(state_dict, prefix)
        # A checkpoint saved with a compensation loads into a layer that has none yet, or one of another rank: make room for it.
        found = {name: state_dict.get(prefix + name) for name in _COMPENSATION}
        if found["comp_down"] is not None and branch_problem(self, self.branch, found["comp_down"], found["comp_up"]) is None:
            self.comp_down, self.comp_up = self._room_for(found["comp_down"]), self._room_for(found["comp_up"])
        if found["sparse_weight"] is not None and self.sparse_weight is None:
            self.sparse_weight = self._room_for(found["sparse_weight"])
        bias, present = found["comp_bias"], self.comp_bias
        if bias is not None and bias.shape == bias_shape(self, bias) and (present is None or present.shape != bias.shape):
            self.comp_bias = self._room_for(bias)
        # Selection's tensors get room of their own: the present ones may be another layer's too, which may have other values.
        if found["shift"] is not None:
            self.shift = self.weight.new_zeros(self.in_features, dtype=torch.float32)
        if found["permutation"] is not None:
            self.permutation = self.weight.new_zeros(self.in_features, dtype=torch.int64)
        if self.is_compact and self.selection == "weight" and prefix + "score" in state_dict:
            self.set_score(self.weight.new_zeros(self.in_features, dtype=torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.derived = Derived.of(self)
        self.take_values_scale()
        self.update_prepared()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # What layers of a group hold in common is in each one's name, and apart: safetensors refuses tensors that share memory.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        others = () if self.input_group is None else self.input_group.before(self)
        for name in ("comp_down", "shift", "permutation", "score"):
            tensor: Tensor | None = getattr(self, name)
            if (
                tensor is not None
                and prefix + name in destination
                and not keep_vars
                and any(getattr(other, name) is tensor for other in others)
            ):
                destination[prefix + name] = destination[prefix + name].clone()

    def _room_for(self, value: Tensor | None) -> nn.Parameter | None:
        return None if value is None else nn.Parameter(self.weight.new_zeros(value.shape, dtype=self.compute_dtype), requires_grad=False)

    def _follow_compact(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Become compact for a checkpoint in which this layer is, and refuse one whose weight could not be read as what it is.

        Raises:
            InvalidArgumentError: It is compact here and not there, or there and cannot be here.
        """
        weight, scale = state_dict.get(prefix + "weight"), state_dict.get(prefix + "compact_scale")
        if scale is None and (weight is None or not self.is_compact):
            return
        if scale is None:
            got, expected = "a checkpoint that is not compact", "a compact one, or a model that rtlynx.compact was not called on"
        elif weight is None or weight.dtype is not E4M3:
            got, expected = "compact_scale without the e4m3 weight it belongs to", "both"
        elif self.precision != "fp8":
            got, expected = f'a compact checkpoint for a layer with precision="{self.precision}"', 'a model applied with precision="fp8"'
        else:
            fitted = prefix + "compact_fitted" in state_dict
            if not self.is_compact:
                self.become_compact(fitted)
            self._mark_fitted(fitted)
            return
        raise InvalidArgumentError("load_state_dict", f"{prefix}weight", got, expected)


def _can_be_added(bias: Tensor) -> bool:
    return bias.dtype in _ADDED and not bias.is_meta and not bias.is_inference()


def _column_norms(layer: LayerState, layers: Sequence[LayerState]) -> Tensor:
    """``‖W_:j‖`` of the stacked weights of ``layers``, or of ``layer`` where none of them counts."""
    counted = [each.weight.detach() for each in layers if not each.repeats] or [layer.weight.detach()]
    norms = [torch.linalg.vector_norm(computable(weight), dim=0, dtype=torch.float32) for weight in counted]
    stacked: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return stacked


def _in_channel_order(layer: LayerState) -> Tensor | None:
    """The layer's score as it would be without its permutation."""
    score, permutation = layer.score, layer.permutation
    return score if score is None or permutation is None else torch.empty_like(score).index_copy_(0, permutation, score)


def same_selection(a: SelectionInputs, b: SelectionInputs) -> bool:
    """Whether two layers ask for the same selection: the same objects, since comparing tensors would cost more than selecting."""
    return all(x is y or (type(x) is float and x == y) for x, y in zip(a, b, strict=True))
