"""What the ops refuse: shapes, dtypes and devices that do not fit, each with the op, the argument, what it got and what it expected.

It runs before every launch: what it builds in words it builds only to refuse.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from rtlynx.errors import InvalidArgumentError
from rtlynx.reference import E4M3, K_MULTIPLE, MAX_RANK, N_MULTIPLE, RANK_MULTIPLE, Activation, metadata_shape

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernels compute in."""
SUPPORTED_DTYPES = {
    "cuda": KERNEL_DTYPES,
    "cpu": (*KERNEL_DTYPES, torch.float32),
    "meta": (*KERNEL_DTYPES, torch.float32),  # not placed yet
}
"""Device type → the dtypes that a layer there may have."""
ALIGNMENT = 16
"""Bytes: the kernels load and store so many at a time."""
_ACTIVATIONS = get_args(Activation)
_ACTIVATIONS_OF_PRODUCTS = ("none", "gelu_tanh")


def check(op: str, argument: str, tensor: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor whose shape (None: any size), dtype or device is not the expected one."""
    if tensor.shape != shape and not _fits(tensor.shape, shape):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise InvalidArgumentError(op, argument, f"shape {tuple(tensor.shape)}", f"shape {wanted}")
    if tensor.dtype != dtype:
        raise InvalidArgumentError(op, argument, f"dtype {tensor.dtype}", f"dtype {dtype}")
    if tensor.device != device:
        raise InvalidArgumentError(op, argument, f"device {tensor.device}", f"device {device}")


def _fits(have: tuple[int, ...], shape: tuple[Any, ...]) -> bool:
    if len(have) != len(shape):
        return False
    for n, want in zip(have, shape, strict=True):  # noqa: SIM110 - a generator takes twice as long
        if want is not None and n != want:
            return False
    return True


def check_dtype(op: str, argument: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuse what cannot be T on this device."""
    if dtype in KERNEL_DTYPES:
        return
    on_cpu = device.type == "cpu"
    if not (on_cpu and dtype in SUPPORTED_DTYPES["cpu"]):
        expected = "bfloat16, float16 or float32" if on_cpu else "bfloat16 or float16"
        raise InvalidArgumentError(op, argument, f"dtype {dtype} on {device.type}", f"{expected} there")


def check_rank(op: str, argument: str, rank: int) -> None:
    """Refuse a rank that the kernels do not take."""
    if rank % RANK_MULTIPLE or not 0 < rank <= MAX_RANK:
        raise InvalidArgumentError(op, argument, f"rank {rank}", f"a multiple of {RANK_MULTIPLE} from {RANK_MULTIPLE} to {MAX_RANK}")


def check_eps(op: str, eps: float) -> None:
    """Refuse what cannot be added under a root."""
    if not 0 <= eps < float("inf"):
        raise InvalidArgumentError(op, "eps", eps, "a finite number, at least 0")


def check_sparsify(
    x: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    branch_input: str,
    eps: float,
    values_dtype: torch.dtype | None,
    values_scale: float,
    activation: str,
    gate: Tensor | None,
    head: Tensor | None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> int:
    """Refuse arguments of `rtlynx.ops.sparsify` that do not fit; returns K."""
    op = "sparsify"
    if x.dim() != 2:
        raise InvalidArgumentError(op, "x", f"{x.dim()} dimensions", "2 dimensions (M, K)")
    check_dtype(op, "x", x.dtype, x.device)
    k = x.shape[1]
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(op, "x", f"K = {k}", f"K a positive multiple of {K_MULTIPLE}")
    if activation != "none" or gate is not None:
        check_activation(op, x, activation, gate)
    if head is not None:
        check(op, "head", head, (x.shape[0], None), x.dtype, x.device)
        if head.shape[1] % K_MULTIPLE:
            raise InvalidArgumentError(op, "head", f"{head.shape[1]} channels", f"a multiple of {K_MULTIPLE}")
        k += head.shape[1]
    if norm_stats is not None or norm_weight is not None or norm_bias is not None:
        check_norm(op, x, norm_stats, norm_weight, norm_bias, activation, head, places)
    if score is not None:
        check(op, "score", score, (k,), torch.float32, x.device)
    if shift is not None:
        check(op, "shift", shift, (k,), torch.float32, x.device)
    if places is not None:  # that they are a permutation is known of a layer's, and would take a pass to know of others
        check(op, "places", places, (k,), torch.uint8, x.device)
    if comp_down is not None:
        check(op, "comp_down", comp_down, (k, None), x.dtype, x.device)
        check_rank(op, "comp_down", comp_down.shape[1])
    if branch_input not in ("input", "dropped"):
        raise InvalidArgumentError(op, "branch_input", repr(branch_input), "'input' or 'dropped'")
    check_eps(op, eps)
    if values_dtype is None:
        if values_scale != 1:
            raise InvalidArgumentError(op, "values_scale", values_scale, "1, since `values_dtype` is None")
    elif values_dtype is not E4M3:
        raise InvalidArgumentError(op, "values_dtype", values_dtype, f"None or {E4M3}")
    elif not 0 < values_scale < float("inf"):
        raise InvalidArgumentError(op, "values_scale", values_scale, "a positive finite number")
    return k


def check_activation(op: str, x: Tensor, activation: str, gate: Tensor | None) -> None:
    """Refuse an activation that there is not, and a gate that does not go with it."""
    if activation not in _ACTIVATIONS:
        raise InvalidArgumentError(op, "activation", repr(activation), f"one of {', '.join(map(repr, _ACTIVATIONS))}")
    gated = activation == "silu_gate"
    if gated != (gate is not None):
        got, expected = ("None", "a tensor") if gated else ("a tensor", "None")
        raise InvalidArgumentError(op, "gate", got, f"{expected}, since `activation` is {activation!r}")
    if gate is not None:
        check(op, "gate", gate, tuple(x.shape), x.dtype, x.device)


def check_norm(
    op: str,
    x: Tensor,
    norm_stats: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    head: Tensor | None,
    places: Tensor | None,
) -> None:
    """Refuse a norm that does not fit x, or does not go with the rest."""
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    if norm_stats is None:
        argument = next(name for name, vector in vectors.items() if vector is not None)
        raise InvalidArgumentError(op, argument, "a tensor", "None, since `norm_stats` is None")
    if activation != "none":
        raise InvalidArgumentError(op, "activation", repr(activation), "'none', since `norm_stats` is given")
    for argument, given in (("head", head), ("places", places)):
        if given is not None:
            raise InvalidArgumentError(op, argument, "a tensor", "None, since `norm_stats` is given")
    m, k = x.shape
    check(op, "norm_stats", norm_stats, (m, 2), torch.float32, x.device)
    samples = None
    for argument, vector in vectors.items():
        if vector is None:
            continue
        check(op, argument, vector, (samples, k), x.dtype, x.device)
        samples = vector.shape[0]
        if samples == 0 or m % samples:
            raise InvalidArgumentError(op, argument, f"{samples} rows", f"a divisor of the {m} rows of x")


def check_sparse_linear(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> torch.dtype:
    """Refuse arguments of `rtlynx.ops.sparse_linear` that do not fit; returns T."""
    op = "sparse_linear"
    if values.dim() != 2:
        raise InvalidArgumentError(op, "values", f"{values.dim()} dimensions", "2 dimensions (M, K/2)")
    device = values.device
    if values.dtype is E4M3:
        if out_dtype is None:
            raise InvalidArgumentError(op, "out_dtype", None, "the dtype of the output, since `values` are e4m3")
        check_dtype(op, "out_dtype", out_dtype, device)
        dtype = out_dtype
    else:
        check_dtype(op, "values", values.dtype, device)
        for argument, given in (("weight_scale", weight_scale), ("out_dtype", out_dtype)):
            if given is not None:
                got = given if argument == "out_dtype" else "a tensor"
                raise InvalidArgumentError(op, argument, got, f"None, since `values` are {values.dtype}")
        dtype = values.dtype
    m, half = values.shape
    k = 2 * half
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(op, "values", f"K/2 = {half}", f"K a positive multiple of {K_MULTIPLE}")
    check(op, "metadata", metadata, metadata_shape(m, k), torch.int32, device)
    check(op, "weight", weight, (None, k), values.dtype, device)
    n = weight.shape[0]
    if n == 0 or n % N_MULTIPLE:
        raise InvalidArgumentError(op, "weight", f"N = {n}", f"N a positive multiple of {N_MULTIPLE}")
    if values.dtype is E4M3:
        if weight_scale is None:
            raise InvalidArgumentError(op, "weight_scale", None, "a tensor, since `values` are e4m3")
        check(op, "weight_scale", weight_scale, (n,), torch.float32, device)
    if row_scale is not None:
        check(op, "row_scale", row_scale, (m,), torch.float32, device)
    if (branch is None) != (comp_up is None):
        absent, present = ("branch", "comp_up") if branch is None else ("comp_up", "branch")
        raise InvalidArgumentError(op, absent, "None", f"a tensor, since `{present}` is given")
    if branch is not None and comp_up is not None:
        check(op, "branch", branch, (m, None), dtype, device)
        rank = branch.shape[1]
        check_rank(op, "branch", rank)
        check(op, "comp_up", comp_up, (n, rank), dtype, device)
    if bias is not None:
        check(op, "bias", bias, (n,), dtype, device)
    if activation != "none" or residual is not None or gate is not None:
        check_epilogue(op, (m, n), dtype, device, activation, residual, gate)
    return dtype


def check_epilogue(
    op: str, y: tuple[int, int], dtype: torch.dtype, device: torch.device, activation: str, residual: Tensor | None, gate: Tensor | None
) -> None:
    """Refuse what cannot follow a product of shape ``y`` and this dtype and device."""
    if activation not in _ACTIVATIONS_OF_PRODUCTS:
        expected = f"one of {', '.join(map(repr, _ACTIVATIONS_OF_PRODUCTS))}"
        raise InvalidArgumentError(op, "activation", repr(activation), expected)
    if residual is not None:
        check(op, "residual", residual, y, dtype, device)
    if gate is not None:
        if residual is None:
            raise InvalidArgumentError(op, "residual", "None", "a tensor, since `gate` is given")
        check(op, "gate", gate, (None, y[1]), dtype, device)
        if gate.shape[0] == 0 or y[0] % gate.shape[0]:
            raise InvalidArgumentError(op, "gate", f"{gate.shape[0]} rows", f"a number of rows that divides M = {y[0]}")


def check_contiguous(op: str, arguments: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    """Refuse a tensor whose elements are not in order. That the kernels can load from its address is seen to in Rust."""
    for argument, tensor in zip(arguments, tensors, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            raise InvalidArgumentError(op, argument, f"strides {tensor.stride()} for shape {tuple(tensor.shape)}", "a contiguous tensor")


def rows_readable(x: Tensor) -> bool:
    """Whether the kernel can read the rows of x in place: unit stride inside a row, every row 16-byte aligned."""
    row, column = x.stride()
    return _readable(x, row, column, x.data_ptr())


def readable(x: Tensor) -> tuple[Tensor, int, int]:
    """x, or a copy of it that the kernel can read, and what has been asked of it by then: the stride of its rows and its address."""
    row, column = x.stride()
    address = x.data_ptr()
    if not _readable(x, row, column, address):
        x = x.clone(memory_format=torch.contiguous_format)
        row, address = x.stride(0), x.data_ptr()
    return x, row, address


def _readable(x: Tensor, row: int, column: int, address: int) -> bool:
    return column == 1 and row >= x.shape[1] and row * x.element_size() % ALIGNMENT == 0 and address % ALIGNMENT == 0


def readable_heads(x: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """x ``(B, S, H, D)``, or a copy of it that the kernel can read; the strides of its samples, tokens and heads, and its address."""
    strides, address = _strides_of_heads(x), x.data_ptr()
    if x.stride(3) != 1 or address % ALIGNMENT or any(stride * x.element_size() % ALIGNMENT for stride in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides, address = _strides_of_heads(x), x.data_ptr()
    return x, strides, address


def _strides_of_heads(x: Tensor) -> tuple[int, int, int]:
    """0 where there is only one, whose stride may be anything."""
    samples, tokens, heads = (stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return samples, tokens, heads


def readable_vector(vector: Tensor | None) -> Tensor | None:
    """A vector, or a copy of it that the kernel can read."""
    if vector is None or (vector.is_contiguous() and vector.data_ptr() % ALIGNMENT == 0):
        return vector
    return vector.clone(memory_format=torch.contiguous_format)
