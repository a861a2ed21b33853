"""An eager call of a `SparseLinear` in one step: nothing is checked twice, one piece of memory holds all that passes between the kernels.

A call without gradients costs the host more in checks, allocations and attributes than in launches. What a first call has checked is
remembered by address, type and size of every tensor it read; a later one that finds them as they were launches at once. Of a layer that had
too few tokens, that it had is remembered: small models, which wait for the host, are made of such layers.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from rtlynx import launch
from rtlynx.activations import selection_does
from rtlynx.checks import ALIGNMENT
from rtlynx.direct import direct
from rtlynx.fp8 import kernel_dtype
from rtlynx.least_tokens import NEVER
from rtlynx.reference import Activation

if TYPE_CHECKING:
    from rtlynx._core import Layer
    from rtlynx.linear import SparseLinear


class LayerCall:
    """What stays the same from one call of a layer to the next, and the calls that find it so.

    It holds no tensor: one that was moved away is free to go.
    """

    __slots__ = ("_core", "_device", "_dtype", "_k", "_least", "_n", "_read")

    def __init__(self, layer: SparseLinear, input: Tensor, core: ModuleType) -> None:
        down, up, buffers = layer.comp_down, layer.comp_up, layer._buffers
        weight, weight_scale = layer.multiplied_weight()
        self._device, self._dtype = input.get_device(), input.dtype
        self._n, self._k = layer.out_features, layer.in_features
        self._least = max(1, layer.least_tokens(input.device)) if layer.small_m == "dense" else 1
        self._read = _read(layer)
        _, _, _, _, _, branch_input, norm_compensation, eps, values_dtype, values_scale = layer.selection_inputs()
        self._core: Layer = core.Layer(
            self._device,
            kernel_dtype(input.dtype, values_dtype),
            self._n,
            self._k,
            layer.rank,
            launch.address(buffers["score"]),
            launch.address(buffers["shift"]),
            launch.address(buffers["places"]),
            launch.address(down),
            launch.address(weight),
            launch.address(weight_scale),
            launch.address(up),
            launch.address(layer.added_bias()),
            norm_compensation,
            branch_input == "dropped",
            eps,
            values_scale,
        )

    @classmethod
    def after(cls, layer: SparseLinear, input: Tensor) -> LayerCall | None:
        """For a layer that has just computed sparse from ``input``; None where its calls need more than the two kernels."""
        buffers, comp_bias = layer._buffers, layer.comp_bias
        tensors = [tensor for tensor in (*layer._parameters.values(), *buffers.values()) if tensor is not None]
        if not input.is_cuda or not direct(input, *tensors) or any(tensor.is_inference() for tensor in tensors):
            return None
        if buffers["permutation"] is not None and buffers["places"] is None:
            return None  # gathered by a pass of its own
        if comp_bias is not None and layer.added_bias() is not buffers["output_bias"] and layer.added_bias() is not comp_bias:
            return None  # a sum or a row that is made anew in every call
        return cls(layer, input, launch.core())

    def __call__(self, layer: SparseLinear, input: Tensor) -> Tensor | None:
        """The layer's output, or None where something is not as it was, or others than the kernels would see the call."""
        m = input.numel() // self._k
        if not self._serves(layer, m, input) or not input.is_contiguous() or input.shape[-1] != self._k or input.data_ptr() % ALIGNMENT:
            return None
        group = None if layer.sharing == 1 else layer.input_group
        if group is not None and input.is_inference():  # has no version, so nothing is kept
            return None
        output, stream = input.new_empty((*input.shape[:-1], self._n)), launch.stream(self._device)
        if group is None:
            workspace = self._workspace(input, m)
            self._core.run(stream, m, input.data_ptr(), workspace.data_ptr(), output.data_ptr())
            return output

        def select(x: Tensor) -> Tensor:
            workspace = self._workspace(x, m)
            self._core.select(stream, m, x.data_ptr(), workspace.data_ptr())
            return workspace

        key = LayerCall, *_selects_by(layer), input._version, stream, torch._C._cuda_isCurrentStreamCapturing()
        self._core.multiply(stream, m, group.once(layer, input, key, select).data_ptr(), output.data_ptr())
        return output

    def fused(
        self,
        layer: SparseLinear,
        x: Tensor,
        activation: Activation,
        gate: Tensor | None,
        head: Tensor | None,
        residual: Tensor | None,
        residual_gate: Tensor | None,
    ) -> Tensor | None:
        """What `SparseLinear.forward_activated` gives for a layer that selects alone, or None as in a call of the layer.

        Nor does it serve under ``torch.autocast``, where what is fused may be of several dtypes.
        """
        before, after = (x, gate, head), (residual, residual_gate)
        columns = x.shape[-1] if x.dim() else 0
        m, head_k = x.numel() // max(columns, 1), self._k - columns
        if not self._serves(layer, m, *before, *after) or layer.sharing > 1 or torch.is_autocast_enabled("cuda"):
            return None
        if activation != "none" and not selection_does(x.device, activation):
            return None
        leading = x.shape[:-1]
        if (gate is not None and gate.shape != x.shape) or (0 if head is None else head.shape[-1]) != head_k:
            return None
        if head is not None and head.shape[:-1] != leading:
            return None
        shape = (*leading, self._n)
        if residual is not None and (residual.shape != shape or not _packed(residual)):
            return None
        if residual_gate is not None and (residual is None or len(leading) != 2):
            return None
        if residual_gate is not None and (residual_gate.shape != (leading[0], self._n) or not _packed(residual_gate)):
            return None
        ldx, ld_gate, ld_head = (0 if tensor is None else _row_step(tensor) for tensor in before)
        if not ldx or (gate is not None and not ld_gate) or (head is not None and not ld_head):
            return None
        output, workspace = x.new_empty(shape), self._workspace(x, m)
        self._core.run_fused(
            launch.stream(self._device),
            m,
            x.data_ptr(),
            ldx,
            activation,
            launch.address(gate),
            ld_gate,
            launch.address(head),
            head_k,
            ld_head,
            workspace.data_ptr(),
            launch.address(residual),
            launch.address(residual_gate),
            0 if residual_gate is None else leading[0],
            output.data_ptr(),
        )
        return output

    def _serves(self, layer: SparseLinear, m: int, *inputs: Tensor | None) -> bool:
        """Whether the layer is as it was, and the m rows and what goes with them are of the kind that it was called with."""
        if m < self._least or layer.dense or layer.dense_step:
            return False
        for tensor in inputs:
            if tensor is not None and (tensor.dtype is not self._dtype or tensor.get_device() != self._device):
                return False
        return direct(*inputs) and self._reads(layer, inputs[0])

    def _reads(self, layer: SparseLinear, input: Tensor | None) -> bool:
        """Whether the layer is as it was, wherever its weight is now: layerwise casting makes that anew for every call."""
        read = _read(layer)
        if read == self._read:
            return True
        if input is None or read is None or self._read is None or _but_for_places(read) != _but_for_places(self._read):
            return False
        moved = LayerCall.after(layer, input)
        if moved is None:
            return False
        self._core, self._read = moved._core, moved._read
        return True

    def _workspace(self, like: Tensor, m: int) -> Tensor:
        return like.new_empty(self._core.workspace_bytes(m) // like.element_size())


class DenseCall:
    """That a layer has too few tokens for a sparse product, and the calls of which that is still true.

    They are those of `torch.nn.Linear`, with or without gradients. It remembers what `SparseLinear.least_tokens` depends on, and holds no
    tensor either.
    """

    __slots__ = ("_device", "_dtype", "_least", "_precision", "_rank")

    def __init__(self, layer: SparseLinear, device: torch.device, least: int) -> None:
        self._device, self._least = device, least
        self._dtype, self._rank, self._precision = layer.weight.dtype, layer.rank, layer.precision

    @classmethod
    def after(cls, layer: SparseLinear, input: Tensor) -> DenseCall | None:
        """For a layer that is about to multiply ``input`` densely; None where that is for another reason."""
        if layer.dense or layer.dense_step:
            return None
        call = cls(layer, input.device, layer.least_tokens(input.device))
        return call if call.serves(layer, input) else None

    def __call__(self, layer: SparseLinear, input: Tensor) -> Tensor | None:
        """The layer's output, or None where something is not as it was."""
        if not self.serves(layer, input):
            return None
        parameters = layer._parameters
        return F.linear(input, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]  # there is a weight

    def serves(self, layer: SparseLinear, input: Tensor) -> bool:
        """Whether a call with as many tokens as ``input`` has, on its device, is such a one."""
        parameters = layer._parameters  # what is not among them, FSDP or a parametrization holds
        weight, down = parameters.get("weight"), parameters.get("comp_down")
        return not (
            (self._least != NEVER and input.shape[:-1].numel() >= self._least)
            or input.device != self._device
            or weight is None
            or weight.dtype is not self._dtype
            or (0 if down is None else down.shape[1]) != self._rank
            or layer.precision != self._precision
            or layer.small_m != "dense"
            or layer._buffers["compact_scale"] is not None
            or "bias" not in parameters
        )


def _read(layer: SparseLinear) -> tuple[object, ...] | None:
    """All that a call reads of a layer but its input, in what changes with it; None where a tensor is of a class of its own."""
    parameters, buffers = layer._parameters, layer._buffers
    weight, bias, own = parameters["weight"], parameters["bias"], parameters.get("sparse_weight")
    down, up, comp_bias = parameters.get("comp_down"), parameters.get("comp_up"), parameters.get("comp_bias")
    if has_torch_function_variadic(weight, bias, own, down, up, comp_bias):
        return None
    output_bias = buffers["output_bias"]
    return (
        layer.branch,
        layer.norm_compensation,
        layer.precision,
        layer.small_m,
        layer._values_scale,
        _place(weight),
        _place(bias),
        _place(own),
        _place(down),
        _place(up),
        _place(comp_bias),
        launch.address(buffers["score"]),
        launch.address(buffers["shift"]),
        launch.address(buffers["permutation"]),
        launch.address(buffers["places"]),
        launch.address(buffers["weight_fp8"]),
        launch.address(buffers["weight_scale"]),
        # The sum of two biases serves until one of them is written to.
        None if output_bias is None else (output_bias.data_ptr(), bias._version, comp_bias._version),  # type: ignore[union-attr]
    )


def _but_for_places(read: tuple[Any, ...]) -> tuple[object, ...]:
    """What was read of a layer, without the addresses of its parameters and what follows from them."""
    options, parameters, buffers, output_bias = read[:5], read[5:11], read[11:17], read[17]
    return options, [place and place[1:] for place in parameters], buffers, output_bias is None


def _packed(tensor: Tensor) -> bool:
    """Whether the product can read it."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def _row_step(x: Tensor) -> int:
    """Elements from one row of ``(..., n)`` to the next; 0 where selection cannot read the rows in place."""
    *sizes, columns = x.shape
    *strides, unit = x.stride()
    if x.is_contiguous():
        step = columns
    elif len(sizes) == 1 or (len(sizes) == 2 and (sizes[0] == 1 or strides[0] == sizes[1] * strides[1])):
        step = strides[-1]
    else:
        return 0
    readable = unit == 1 and step >= columns and step * x.element_size() % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    return step if readable else 0


def _place(tensor: Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_contiguous())


def _selects_by(layer: SparseLinear) -> tuple[object, ...]:
    """Of that, what its selection depends on, written to or not."""
    buffers, down = layer._buffers, layer._parameters.get("comp_down")
    tensors = buffers["score"], buffers["shift"], buffers["places"], down
    places = [None if tensor is None else (tensor.data_ptr(), tensor._version) for tensor in tensors]
    return layer.branch, layer.norm_compensation, layer.precision, layer._values_scale, *places
