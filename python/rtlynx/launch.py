"""From tensors to one call of ``rtlynx._core``.

Nothing is allocated and shapes are taken on trust; Rust checks which addresses are there and whether the kernels can load from them.
This is all that a compiled model runs of rtlynx's Python, some hundred times in a step: arguments go by position, which takes a fifth of
the time that names take.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from rtlynx import plans
from rtlynx.checks import readable, readable_heads, readable_vector
from rtlynx.errors import DeviceError, RTLynxError
from rtlynx.fp8 import kernel_dtype
from rtlynx.usable import kernel_or_reason


def sparsify(
    x: Tensor,
    gate: Tensor | None,
    head: Tensor | None,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    values: Tensor,
    metadata: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    branch_of_dropped: bool,
    eps: float,
    values_scale: float,
    activation: str,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """Enqueue `rtlynx.ops.sparsify` on the current stream of its device, to write ``values``, ``metadata``, ``row_scale``, ``branch``.

    x, gate and head are copied where the kernel cannot read them in place, weight and bias of a norm where they are not contiguous. All
    else is.
    """
    m, half = values.shape
    if m == 0:
        return
    x, ldx, x_address = readable(x)
    ld_gate = gate_address = head_k = ld_head = head_address = norm_rows = 0
    if gate is not None:
        gate, ld_gate, gate_address = readable(gate)
    if head is not None:
        head_k = head.shape[1]
        head, ld_head, head_address = readable(head)
    if norm_stats is not None:
        activation = "norm"
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        norm_bias = None if norm_bias is None else norm_bias.contiguous()
        vectors = norm_bias if norm_weight is None else norm_weight
        norm_rows = m if vectors is None else m // vectors.shape[0]
    device_index = x.get_device()
    core().sparsify(
        device_index,
        stream(device_index),
        kernel_dtype(x.dtype, values.dtype),
        m,
        2 * half,  # k
        ldx,
        0 if branch is None else branch.shape[1],  # rank
        activation,
        head_k,
        ld_head,
        ld_gate,
        norm_rows,
        x_address,
        gate_address,
        head_address,
        0 if norm_stats is None else norm_stats.data_ptr(),
        0 if norm_weight is None else norm_weight.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(),
        0 if score is None else score.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        0 if places is None else places.data_ptr(),
        0 if comp_down is None else comp_down.data_ptr(),
        values.data_ptr(),
        metadata.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        0 if branch is None else branch.data_ptr(),
        branch_of_dropped,
        eps,
        values_scale,
    )


def row_stats(h: Tensor, stats: Tensor, centered: bool, eps: float) -> None:
    """Enqueue `rtlynx.row_stats.row_stats` on the current stream of its device, to write ``stats``, which is contiguous.

    h is copied where the kernel cannot read it in place.
    """
    m, k = h.shape
    if m == 0:
        return
    h, ldx, h_address = readable(h)
    device_index = h.get_device()
    core().row_stats(
        device_index,
        stream(device_index),
        kernel_dtype(h.dtype, h.dtype),
        m,
        k,
        ldx,
        h_address,
        stats.data_ptr(),
        centered,
        eps,
    )


def norm_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    first: Tensor | None,
    first_weight: Tensor | None,
    first_eps: float,
    out: Tensor,
) -> None:
    """Enqueue `rtlynx.norm_rotary.norm_rotary` on the current stream of its device, to write ``out``, which is contiguous.

    All others are copied where the kernel cannot read them in place.
    """
    samples, tokens, heads, dim = x.shape
    if out.numel() == 0:
        return
    x, strides, x_address = readable_heads(x)
    first_tokens = first_address = 0
    first_strides = 0, 0, 0
    if first is not None and first.shape[1]:
        first_tokens = first.shape[1]
        first, first_strides, first_address = readable_heads(first)
    weight, first_weight = readable_vector(weight), readable_vector(first_weight)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    device_index = out.get_device()
    core().norm_rotary(
        device_index,
        stream(device_index),
        kernel_dtype(out.dtype, out.dtype),
        samples,
        tokens,
        first_tokens,
        heads,
        dim,
        strides,
        first_strides,
        cos.stride(),
        x_address,
        first_address,
        address(weight),
        address(first_weight),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        eps,
        first_eps,
    )


def sparse_linear(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    out: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Enqueue `rtlynx.ops.sparse_linear` on the current stream of its device, to write ``out``. All tensors are contiguous."""
    m, n = out.shape
    if m == 0:
        return
    device_index = values.get_device()
    core().sparse_linear(
        device_index,
        stream(device_index),
        kernel_dtype(out.dtype, values.dtype),
        m,
        n,
        weight.shape[1],  # k
        0 if branch is None else branch.shape[1],  # rank
        values.data_ptr(),
        metadata.data_ptr(),
        weight.data_ptr(),
        0 if weight_scale is None else weight_scale.data_ptr(),
        0 if row_scale is None else row_scale.data_ptr(),
        0 if branch is None else branch.data_ptr(),
        0 if comp_up is None else comp_up.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        activation,
        0 if residual is None else residual.data_ptr(),
        0 if gate is None else gate.data_ptr(),
        0 if gate is None else gate.shape[0],  # gates
    )


def address(tensor: Tensor | None) -> int:
    """Of a tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device_index: int) -> int:
    """The handle of torch's current stream, without the object that `torch.cuda.current_stream` makes around it."""
    return torch._C._cuda_getCurrentRawStream(device_index)


@functools.cache
def core() -> ModuleType:
    """The compiled extension, imported when the first CUDA tensor arrives, with what `rtlynx.autotune` saved for this machine's GPUs."""
    try:
        from rtlynx import _core as extension
    except ImportError as error:
        message = f"rtlynx._core is not built ({error}); install the package with `pip install .`"
        raise DeviceError("rtlynx", "device", "a package without its extension", "rtlynx._core", message) from error
    plans.use_saved(extension)
    return extension


@functools.cache
def why_no_kernels(device: torch.device) -> str | None:
    """Why no kernel can run on a GPU, or None if some can. What is not a GPU needs none."""
    if device.type != "cuda":
        return None
    try:
        extension = core()
        gpus = extension.devices()
        index = torch.cuda.current_device() if device.index is None else device.index
        return kernel_or_reason(extension, gpus[index])[1] or None
    except RTLynxError as error:
        return error.message
