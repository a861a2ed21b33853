"""`SparseLinear`: an ``nn.Linear`` whose input is 2:4-sparsified on the fly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import ops
from rtlynx.activations import selection_norms
from rtlynx.autocast import autocast_dtype
from rtlynx.checks import SUPPORTED_DTYPES, check_activation
from rtlynx.config import SparsityConfig
from rtlynx.derived import Derived, bias_of_shift, in_order
from rtlynx.epilogue import added, check_residual, in_product
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import check_values_scale, dequantized_weight
from rtlynx.layer_call import DenseCall, LayerCall
from rtlynx.layer_shapes import check_compensation
from rtlynx.layer_state import LayerState
from rtlynx.layerwise_casting import in_8_bits
from rtlynx.least_tokens import least_tokens
from rtlynx.reference import E4M3, Activation, activated
from rtlynx.take_over import take_over

if TYPE_CHECKING:
    from rtlynx.adaln_shift import ShiftReader


class SparseLinear(LayerState):
    """A linear layer that multiplies the 2:4-sparsified input by the dense weight, plus a rank-r branch::

        Y = s · S(X - m) Wᵀ + Z · comp_down · comp_upᵀ + bias + comp_bias

    with ``S`` the selection, ``s`` the norm compensation of each token, ``m`` the shift (0 without one) and ``Z`` what the
    branch reads: ``X - m`` (``branch="input"``) or what selection dropped, ``X - m - S(X - m)`` (``branch="dropped"``). Where calibration
    gave the layer a permutation, X stands for the gathered ``X[:, permutation]``; where it gave a weight of its own, the
    sparse product uses that one for W. With ``precision="fp8"`` the sparse product is that of S(X - m) and W rounded to e4m3.

    It is an ``nn.Linear``: ``weight`` ``(N, K)`` stays dense, in the standard layout and bit for bit what it was, so that
    adapters, fusing and offloading work as on any linear (`rtlynx.compact` gives that up).
    Until `set_compensation` there is no branch and the state dict has the keys of ``nn.Linear``.

    Args:
        in_features: K, a multiple of 64.
        out_features: N, a multiple of 8.
        bias: Whether there is a bias.
        device: Where to create the parameters.
        dtype: bfloat16 or float16; also float32 on the CPU.
        config: How it computes; its `include`, `skip` and `rank` are not used here.

    Attributes:
        dense: When True the layer is exactly ``F.linear(x, weight, bias)``; a compact one multiplies by its e4m3 weight times its scale.
        dense_step: The same for the present step; set by `rtlynx.dense_steps`.
        branch, selection, norm_compensation, small_m, precision: As in `SparsityConfig`.
        values_scale: With ``precision="fp8"``: what kept values are multiplied by before they are rounded to e4m3, whose largest number
            is 448; a power of two, 1 at first. Setting it prepares the weight anew.
        comp_down: Parameter ``(K, r)`` or None. Compensation parameters do not require gradients unless asked to.
        comp_up: Parameter ``(N, r)`` or None.
        comp_bias: Parameter ``(N,)`` or None: ``m · Wᵀ`` where there is a `shift`, and what calibration fitted beside it. ``(G, N)``: one
            for each of G groups of timesteps (`rtlynx.bias_groups`).
        bias_group: ``(1,)`` int64 or None: which of the G is added now; written before every step by a hook on the model.
        sparse_weight: Parameter ``(N, K)`` or None: what the sparse product multiplies with instead of `weight`, columns permuted.
        shift: Buffer ``(K,)`` float32 or None, in the order of the gathered input.
        permutation: Buffer ``(K,)`` int64 or None.
        places: Buffer ``(K,)`` uint8, the permutation as the selection kernel reads it (`rtlynx.reference.places_of`), so that X is not
            gathered by a pass of its own; None without one that stays in its windows. Not saved.
        score: Buffer ``(K,)`` float32, ``‖W_:j‖``, with ``selection="weight"``, else None. Not saved: see `update_score`.
        weight_fp8: Buffer ``(N, K)`` e4m3, made from `sparse_weight` or `weight`, with ``precision="fp8"``, else None. Not saved: see
            `update_weight_fp8`.
        output_bias: Buffer ``(N,)``, ``bias + comp_bias`` where there are both and no groups of timesteps, else None. Not saved.
        weight_scale: Buffer ``(N,)`` float32 that belongs to it, the `values_scale` divided out; else None.
        compact_scale: Buffer ``(N,)`` float32 or None. Where there is one the layer is compact (`rtlynx.compact`): `weight` is the e4m3
            copy, its columns in the gathered order, `weight_fp8` and `sparse_weight` are None, and ``weight · compact_scale`` stands for
            the weight wherever the layer computes densely. Saved; so is a compact layer's `score`.
        compact_values_scale: Buffer ``(1,)`` float32 with it: `values_scale`, which then travels in the state dict.
        compact_fitted: Buffer ``(1,)`` uint8 where what was copied is a `sparse_weight` that was fitted: there is no dense product then.
        input_group: The layers that read the same tensor, set by `rtlynx.apply`; None for a layer that reads alone.
        sharing: How many layers of the group ask for the same selection, this one included.
        repeats: Whether its rows are those of other layers that it was fused from, so that they do not count twice in a score.
        shift_reader: The hooks of `rtlynx.adaln_shift` around it; None where it reads no shift of adaLN, or keeps it.
        derived: How the compensation hangs together with the weight it was given with, for `rtlynx.refresh`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: SparsityConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.dense = self.dense_step = False
        self._call: LayerCall | DenseCall | None = None
        self.shift_reader: ShiftReader | None = None
        self.bias_group: Tensor | None = None
        self.configure(config or SparsityConfig())

    def configure(self, config: SparsityConfig) -> None:
        """Compute as ``config`` says from now on; a compensation fitted for other arithmetic must be cleared by the caller.

        Raises:
            InvalidArgumentError: The layer is compact and would need the weight it no longer has.
        """
        if self.is_compact and (config.precision, config.selection) != (self.precision, self.selection):
            expected = f'precision="{self.precision}" and selection="{self.selection}" on a compact layer, whose other weight is gone'
            got = f'precision="{config.precision}" and selection="{config.selection}"'
            raise InvalidArgumentError("SparseLinear.configure", "config", got, expected)
        self.branch = config.branch
        self.selection = config.selection
        self.norm_compensation = config.norm_compensation
        self.small_m = config.small_m
        self.precision = config.precision
        self.update_prepared()

    @property
    def values_dtype(self) -> torch.dtype | None:
        """Dtype of the sparse product's operands where it is not the model's."""
        return E4M3 if self.precision == "fp8" else None

    @property
    def values_scale(self) -> float:  # documented with the attributes
        return self._values_scale

    @values_scale.setter
    def values_scale(self, scale: float) -> None:
        check_values_scale("SparseLinear", scale)
        self._values_scale = float(scale)
        self.update_weight_fp8()
        self._tie()

    # ---- to and from nn.Linear ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SparsityConfig | None = None) -> SparseLinear:
        """A sparse layer that shares ``linear``'s Parameter objects, hooks and other attributes; nothing is copied."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        take_over(layer, linear)
        layer.configure(config or SparsityConfig())
        return layer

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` again: the same Parameter objects and hooks, without the compensation."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        take_over(linear, self)
        return linear

    # ---- compensation -------------------------------------------------------------------------------------------------------------------

    def set_compensation(
        self,
        comp_down: Tensor | None = None,
        comp_up: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        comp_bias: Tensor | None = None,
        permutation: Tensor | None = None,
        sparse_weight: Tensor | None = None,
        values_scale: Tensor | float = 1.0,
    ) -> None:
        """Replace the compensation. Tensors are copied to the weight's dtype and device (`shift`: float32, `permutation`: int64).

        While layerwise casting stores the weight in 8 bits, branch and bias keep their dtypes until the layer is called.

        Args:
            comp_down: ``(K, r)``, r a multiple of 16 up to 128; None for no branch. Rows are in the order of the gathered input.
            comp_up: ``(N, r)``, given exactly if `comp_down` is.
            shift: ``(K,)``, in the order of the gathered input.
            comp_bias: ``(N,)``, or ``(G, N)`` for G groups of timesteps, which `rtlynx.bias_groups.install_bias_groups` then has to tell
                apart; None: ``shift · Wᵀ``, which makes up for the shift and nothing else.
            permutation: ``(K,)``, every channel once; None: as they come.
            sparse_weight: ``(N, K)``, columns in the gathered order; None: the layer's weight.
            values_scale: See the attribute; a number, or the one element of a tensor.

        Raises:
            InvalidArgumentError: A shape does not fit, `values_scale` is no power of two, or a branch is given to a layer with
                ``branch="none"``, or the layer is compact: what follows from the weight could not be made.
        """
        if self.is_compact:
            raise InvalidArgumentError("SparseLinear.set_compensation", "self", "a compact layer", "one that has its weight")
        check_compensation(
            "SparseLinear.set_compensation",
            self,
            self.branch,
            comp_down=comp_down,
            comp_up=comp_up,
            shift=shift,
            comp_bias=comp_bias,
            permutation=permutation,
            sparse_weight=sparse_weight,
            values_scale=values_scale,
        )

        weight = self.weight

        def parameter(value: Tensor | None, small: bool = True) -> nn.Parameter | None:
            if value is None:
                return None
            dtype = value.dtype if small and in_8_bits(weight) else weight.dtype
            return nn.Parameter(value.detach().to(weight.device, dtype, copy=True).contiguous(), requires_grad=False)

        self.comp_down, self.comp_up = parameter(comp_down), parameter(comp_up)
        self.shift = None if shift is None else shift.detach().to(self.weight.device, torch.float32, copy=True)
        self.permutation = None if permutation is None else permutation.detach().to(self.weight.device, torch.int64, copy=True)
        if sparse_weight is None and self.permutation is not None:
            sparse_weight = in_order(self)
        self.sparse_weight = parameter(sparse_weight, small=False)
        if comp_bias is None and self.shift is not None:
            comp_bias = bias_of_shift(self)
        self.comp_bias = parameter(comp_bias)
        self._values_scale = float(values_scale)
        self.derived = Derived.of(self)
        self.update_prepared()

    # ---- nn.Module ----------------------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K)`` → ``(..., N)``, same dtype.

        Under ``torch.autocast`` as an ``nn.Linear``: any input that it casts, an output of its dtype. The layer computes in its own dtype
        all the same; where input and layer are both of one half precision, so is the output.

        Raises:
            InvalidArgumentError: The input does not fit.
        """
        eager = not torch.compiler.is_compiling()
        if eager and (reader := self.shift_reader) is not None and reader.left_to_layer:
            return reader.output(self, input)
        if eager and (call := self._call) is not None and (output := call(self, input)) is not None:
            return output
        tokens = input.shape[:-1]
        if self.is_dense_now(tokens.numel(), input.device):
            if eager and not isinstance(self._call, LayerCall):  # one that was sparse before will be again
                self._call = DenseCall.after(self, input)
            return self._dense(input)
        output = self.multiply(self._selected(input), self.compute_dtype, tokens)
        if (cast := self._autocast_dtype(input)) is not None:
            return output.to(cast)
        self._remember(input)
        return output

    def forward_gated(self, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
        """``residual + gate.unsqueeze(1) * layer(x)``, added before the output is written if the layer runs sparse and gradients are off.

        There it is rounded once; elsewhere it is computed step by step. Hooks on the layer do not run.

        Args:
            x: ``(B, S, K)``; ``(..., K)`` without a gate.
            residual: ``(B, S, N)`` of the same dtype; ``(..., N)`` without a gate. A strided one is added in a step of its own.
            gate: ``(B, N)`` of the same dtype; None: 1.

        Returns:
            ``(B, S, N)``, same dtype, in memory of its own.

        Raises:
            InvalidArgumentError: An argument does not fit.
        """
        if (output := self._called_before(x, "none", None, None, residual, gate)) is not None:
            return output
        check_residual("SparseLinear.forward_gated", x, self.out_features, residual, gate)
        tokens = x.shape[:-1]
        if self.is_dense_now(tokens.numel(), x.device) or autocast_dtype(x.device) is not None:
            return added(self.forward(x), residual, gate)
        output = self.multiply(self._selected(x), x.dtype, tokens, residual, gate)
        self._remember(x)
        return output

    def forward_activated(
        self,
        x: Tensor,
        activation: Activation = "none",
        gate: Tensor | None = None,
        head: Tensor | None = None,
        residual: Tensor | None = None,
        residual_gate: Tensor | None = None,
    ) -> Tensor:
        """What the layer gives for ``cat([head, act(x)], -1)``, which is not written to memory where the layer can take it `in_selection`.

        With a residual it is ``residual + residual_gate.unsqueeze(1) * that``, as in `forward_gated`.

        Hooks on the layer do not run, as in a call of `forward`.

        Args:
            x: ``(..., K - K0)``, K0 a multiple of 64: the channels of `head`, 0 without it. Rows may be apart, as those of a chunk are.
            activation: See `rtlynx.reference.activated`, as for the others.
            gate: ``(..., K - K0)`` of the same dtype with ``"silu_gate"``, else None.
            head: ``(..., K0)`` of the same dtype, or None.
            residual: ``(B, S, N)`` of the same dtype, or None; ``(..., N)`` without `residual_gate`.
            residual_gate: ``(B, N)`` of the same dtype, or None.

        Returns:
            ``(..., N)``, same dtype.

        Raises:
            InvalidArgumentError: An argument does not fit.
        """
        op = "SparseLinear.forward_activated"
        check_residual(op, x, self.out_features, residual, residual_gate, "residual_gate")
        if self.in_selection(x.shape[:-1].numel(), x.device):
            return self.select_activated(x, activation, gate, head, residual, residual_gate)
        check_activation(op, x, activation, gate)
        x = activated(x, activation, gate, head)
        return self.forward(x) if residual is None else self.forward_gated(x, residual, residual_gate)

    def in_selection(self, tokens: int, device: torch.device) -> bool:
        """Whether a selection from so many tokens can take in what comes before it.

        Not where there is none, nor where others select from the same tensor or channels are gathered by a pass of its own first, nor under
        ``torch.autocast``, where what comes before it may be of another dtype.
        """
        gathers = self._buffers["permutation"] is not None and self._buffers["places"] is None
        return not (self.sharing > 1 or gathers or self.is_dense_now(tokens, device) or autocast_dtype(device) is not None)

    def select_activated(
        self,
        x: Tensor,
        activation: Activation,
        gate: Tensor | None = None,
        head: Tensor | None = None,
        residual: Tensor | None = None,
        residual_gate: Tensor | None = None,
    ) -> Tensor:
        """`forward_activated` for who has asked `in_selection`."""
        if (output := self._called_before(x, activation, gate, head, residual, residual_gate)) is not None:
            return output
        self.check_input("SparseLinear.forward_activated", "x", x, 0 if head is None else head.shape[-1])
        _, places, *arguments = self.selection_inputs()
        gate, head = None if gate is None else _rows(gate), None if head is None else _rows(head)
        selected = ops.sparsify(_rows(x), *arguments, activation, gate, head, places=places)  # type: ignore[call-arg, misc]  # mypy cannot count them
        output = self.multiply(selected, x.dtype, x.shape[:-1], residual, residual_gate)
        self._remember(x)
        return output

    def _called_before(self, x: Tensor, *fused: Any) -> Tensor | None:
        """What an eager call without gradients that was remembered leads to (`LayerCall.fused`); None where none does."""
        call = None if torch.compiler.is_compiling() else self._call
        return call.fused(self, x, *fused) if isinstance(call, LayerCall) else None

    def _remember(self, x: Tensor) -> None:
        """Have later calls take the way of this one, which computed sparse from x, where it was eager and without gradients."""
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            self._call = LayerCall.after(self, x)

    def check_input(self, op: str, argument: str, x: Tensor, others: int = 0) -> None:
        """Refuse what is not ``(..., K - others)`` of the layer's dtype and on its device, before selection runs on it.

        Raises:
            InvalidArgumentError: It is not.
        """
        channels = self.in_features - others
        if x.dim() == 0 or x.shape[-1] != channels:
            raise InvalidArgumentError(op, argument, f"shape {tuple(x.shape)}", f"shape (..., {channels})")
        if x.dtype != self.compute_dtype:
            raise InvalidArgumentError(op, argument, f"dtype {x.dtype}", f"dtype {self.compute_dtype}, as the layer's weight")
        device = self._parameters["weight"].device  # type: ignore[union-attr]
        if x.device != device:
            raise InvalidArgumentError(op, argument, f"device {x.device}", f"device {device}, as the layer's weight")

    def takes_norm(self, tokens: int, device: torch.device) -> bool:
        """Whether a selection from so many tokens can take in the norm before it (`rtlynx.select_normed.select_normed`).

        Not where there is none, nor where channels are gathered first, nor where no kernel of the device does it, nor under
        ``torch.autocast``. Other layers may select from the same tensor.
        """
        if self._buffers["permutation"] is not None or self.is_dense_now(tokens, device) or autocast_dtype(device) is not None:
            return False
        return selection_norms(device)

    def _dense(self, input: Tensor) -> Tensor:
        return self._dense_product(input, self.bias)

    def _dense_product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        scale, permutation = buffers["compact_scale"], buffers["permutation"]
        if scale is None:
            return F.linear(input, self.weight, bias)
        if buffers["compact_fitted"] is not None:
            got = "a dense product of a compact layer, whose weight was fitted for sparse products"
            raise InvalidArgumentError("SparseLinear", "dense", got, "a sparse one")
        if permutation is not None:  # a compact layer's weight has its columns in the gathered order
            input = input.index_select(-1, permutation)
        return F.linear(input, dequantized_weight(self.weight, scale, input.dtype), bias)

    def is_dense_now(self, tokens: int, device: torch.device) -> bool:
        """Whether it computes the dense product of so many tokens on ``device``."""
        return self.dense or self.dense_step or (self.small_m == "dense" and tokens < self.least_tokens(device))

    def was_dense(self, x: Tensor) -> bool:
        """The same for as many tokens as x has, known from an eager call before, which is faster to ask; False says nothing."""
        call = self._call
        return isinstance(call, DenseCall) and call.serves(self, x)

    def multiply(
        self,
        selected: ops.Sparsified,
        dtype: torch.dtype,
        tokens: torch.Size,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """The product and all that is added to it, of a selection as this layer would make it.

        Args:
            selected: From `rtlynx.select_normed.select_normed` with this layer, or another one's that asks for the same selection.
            dtype: That of the layer's input and output.
            tokens: The leading dimensions of the output and of the residual; their product is M.
            residual: ``(*tokens, N)``: what the output, times the gate, is added to.
            gate: ``(B, N)``, each row for the next M / B tokens.
            shift: ``(B, K)``, B the first of `tokens`: what was taken away from each sample's tokens before they were selected from;
                ``shift · Wᵀ`` is added. None with a residual.

        Returns:
            ``(*tokens, N)``.
        """
        values, metadata, row_scale, branch = selected
        weight, weight_scale = self.multiplied_weight()
        comp_up = self.comp_up  # an attribute that is a parameter is slow to read: each once
        rows = None if residual is None or not in_product(residual) else _rows(residual)
        bias = self.added_bias()
        of_shift = None if shift is None else self._dense_product(shift, bias)
        if of_shift is not None:
            bias = of_shift[0] if len(of_shift) == 1 else None
        output = ops.sparse_linear(
            values,
            metadata,
            weight,
            row_scale if self.norm_compensation else None,
            None if comp_up is None else branch,
            comp_up,
            bias,
            weight_scale,
            dtype if weight_scale is not None else None,
            "none",
            rows,
            None if rows is None or gate is None else gate.contiguous(),
        )
        output = output if len(tokens) == 1 else output.view(*tokens, self.out_features)
        if of_shift is not None and len(of_shift) > 1:
            output += of_shift.unsqueeze(1)
        return added(output, residual, gate) if rows is None else output

    def multiplied_weight(self) -> tuple[Tensor, Tensor | None]:
        """What the sparse product multiplies by: in fp8 the e4m3 copy, which of a compact layer is the weight itself, and its scale."""
        weight, own = self.weight, self.sparse_weight
        if own is not None:
            weight = own
        if self.precision != "fp8":
            return weight, None
        copied, scale = self._buffers["weight_fp8"], self._buffers["weight_scale"]
        assert scale is not None
        if copied is None:
            return weight, scale
        if torch.is_grad_enabled() and weight.requires_grad:
            # A zero that depends on the weight: the output then requires a gradient too, and the backward pass says that there is none.
            scale = scale + weight[:0].sum(dtype=torch.float32)
        return copied, scale

    def _selected(self, input: Tensor) -> ops.Sparsified:
        """`_select`, or what another layer of the group has selected from the same tensor."""
        if torch.compiler.is_compiling() or self.input_group is None or self.sharing == 1:
            return self._select(input)
        return self.input_group.select(self, input, self._select)

    def _select(self, input: Tensor) -> ops.Sparsified:
        if self._autocast_dtype(input) is not None:  # here, so that layers which read one tensor still select from it once
            input = input.to(self.compute_dtype)
        self.check_input("SparseLinear", "input", input)
        permutation, places, *arguments = self.selection_inputs()
        x = _rows(input)
        if permutation is not None:
            x = x.index_select(1, permutation)
        return ops.sparsify(x, *arguments, places=places)  # type: ignore[misc]  # mypy cannot count them

    def _autocast_dtype(self, input: Tensor) -> torch.dtype | None:
        """In which dtype ``torch.autocast`` wants the output for this input; None where nothing is to be cast.

        Not where both are of one half precision, so that the calls of `rtlynx.layer_call`, which have no other, need not ask.
        """
        dtype = input.dtype
        if (dtype is self.compute_dtype and dtype is not torch.float32) or dtype not in SUPPORTED_DTYPES["cpu"]:
            return None
        return autocast_dtype(input.device)

    def least_tokens(self, device: torch.device) -> int:
        """From how many tokens on this layer is faster sparse than dense on ``device``.

        0 for a compact layer: its dense weight would first have to be made.
        """
        if self.is_compact:
            return 0
        return least_tokens(device, self.out_features, self.in_features, self.rank, self.compute_dtype, self.values_dtype)

    def extra_repr(self) -> str:
        compensation = f"rank={self.rank}, branch={self.branch}, norm_compensation={self.norm_compensation}"
        fitted = (("shift", self.shift), ("permutation", self.permutation), ("sparse_weight", self.sparse_weight))
        shift = "".join(f", {name}=True" for name, tensor in fitted if tensor is not None)
        precision = self.precision if self.values_scale == 1 else f"{self.precision}, values_scale={self.values_scale}"
        groups = f", bias_groups={self.bias_groups}" if self.bias_groups > 1 else ""
        switches = f"selection={self.selection}{shift}{groups}, precision={precision}, dense={self.dense}"
        compact = ", compact=True" if self.is_compact else ""
        return f"{super().extra_repr()}, {compensation}, {switches}{compact}"


def _rows(x: Tensor) -> Tensor:
    """``(..., n)`` as ``(M, n)``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
