"""The two torch custom ops everything else is built from: ``rtlynx::sparsify`` and ``rtlynx::sparse_linear``.

CPU tensors run `rtlynx.reference`, which defines the semantics; CUDA tensors run the kernels through ``rtlynx._core``. Both are traced by
``torch.compile`` (fake implementations, dynamic M) and, but for fp8, differentiable. An op holds no state: memory comes from torch's
allocator, work goes to torch's current stream of the tensors' device.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rtlynx import plans, reference
from rtlynx.direct import direct
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.fp8 import kernel_dtype
from rtlynx.inductor import share_selections
from rtlynx.reference import E4M3, EPS, K_MULTIPLE, MAX_RANK, N_MULTIPLE, RANK_MULTIPLE, BranchInput, Sparsified, metadata_shape

__all__ = ["Sparsified", "sparse_linear", "sparsify"]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: the kernels load and store 16 at a time

_library = torch.library.Library("rtlynx", "DEF")
_library.define(
    "sparsify(Tensor x, Tensor? score, Tensor? shift, Tensor? comp_down, str branch_input, bool norm_compensation, float eps,"
    " ScalarType? values_dtype=None, float values_scale=1.0) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sparse_linear(Tensor values, Tensor metadata, Tensor weight, Tensor? row_scale, Tensor? branch, Tensor? comp_up, Tensor? bias,"
    " Tensor? weight_scale=None, ScalarType? out_dtype=None) -> Tensor"
)


def sparsify(
    x: Tensor,
    score: Tensor | None = None,
    shift: Tensor | None = None,
    comp_down: Tensor | None = None,
    branch_input: BranchInput = "dropped",
    norm_compensation: bool = True,
    eps: float = EPS,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
) -> Sparsified:
    """Keep the 2 largest of every 4 channels of each token and compress them; in the same pass measure the row and feed the branch.

    With ``X' = x - shift`` (float32, rounded to T), ``S`` the selection by ``|X'|·score`` and ``s`` the row scale::

        s      = sqrt(‖X'‖² / (‖S(X')‖² + eps))        norm compensation of RT-Lynx (arXiv 2605.26632); 1 when it is off
        branch = X' · comp_down                        branch_input = "input": the paper's branch
               = (X' - S(X')) · comp_down              branch_input = "dropped": split, a branch on what selection dropped

    Args:
        x: ``(M, K)`` of dtype T: bfloat16 or float16, also float32 on the CPU. K a multiple of 64, any M ≥ 0. Copied if its last dimension
            is strided or its rows are not 16-byte aligned; a strided first dimension is read in place.
        score: optional ``(K,)`` float32 factor on the magnitudes that selection compares. Values are stored without it.
        shift: optional ``(K,)`` float32 vector subtracted first; add ``shift · Wᵀ`` to the bias.
        comp_down: optional ``(K, r)`` of dtype T, r a multiple of 16 up to 128; row k holds the coefficients of channel k.
        branch_input: ``"dropped"`` or ``"input"``; without `comp_down` it says nothing.
        norm_compensation: whether to compute the row scale.
        eps: ε of the row scale.
        values_dtype: ``torch.float8_e4m3fn`` to store the kept values in fp8; None: in T. Selection, row scale and branch are the same.
        values_scale: what kept values are multiplied by before they are rounded to fp8; 1 without fp8.

    Returns:
        `Sparsified`: values ``(M, K/2)``, metadata int32, row_scale ``(M,)`` float32 (``(0,)`` when off), branch ``(M, r)`` (``(M, 0)``
        without).

    Ties go to the lower channel. NaN ranks above infinity and is kept, so a non-finite token gives a non-finite row. An all-zero row has
    scale 0. The gradient passes straight through the mask; the row scale is a constant to it. In fp8 an infinity saturates at ±448 (its
    row scale is NaN all the same), NaN stays NaN, and there is no gradient: see `sparse_linear`.

    Raises:
        InvalidArgumentError: a dtype, shape or device does not fit; nothing has been launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    arguments = x, score, shift, comp_down, branch_input, norm_compensation, eps, values_dtype, values_scale
    if direct(x, score, shift, comp_down):
        return _sparsify_cuda(*arguments)
    return Sparsified(*torch.ops.rtlynx.sparsify(*arguments))


def sparse_linear(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None = None,
    branch: Tensor | None = None,
    comp_up: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``row_scale · (S(X) · weightᵀ) · weight_scale + branch · comp_upᵀ + bias`` on sparse tensor cores, summed in float32.

    Args:
        values: ``(M, K/2)`` of dtype T, or e4m3 (fp8), from `sparsify`.
        metadata: ``(⌈K/256⌉, 4⌈M/64⌉, 32, 4)`` int32, from `sparsify`.
        weight: ``(N, K)`` of the values' dtype, the dense weight in nn.Linear's layout. N a multiple of 8.
        row_scale: optional ``(M,)`` float32.
        branch: optional ``(M, r)`` of dtype T; needs `comp_up`.
        comp_up: optional ``(N, r)`` of dtype T; needs `branch`.
        bias: optional ``(N,)`` of dtype T.
        weight_scale: ``(N,)`` float32, a factor for each output channel, with e4m3 values (see `rtlynx.fp8.quantize_weight`); else None.
        out_dtype: T with e4m3 values, which do not tell it; else None.

    Returns:
        ``(M, N)`` of dtype T.

    With e4m3 values there is no gradient: where an input requires one, the backward pass raises instead of leaving out what went through
    the rounding. ``torch.compile`` traces a backward pass ahead of time, so it needs ``torch.no_grad()`` there.

    Raises:
        InvalidArgumentError: a dtype, shape or device does not fit, or a tensor is not contiguous; nothing has been launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    tensors = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale
    if direct(*tensors):
        return _sparse_linear_cuda(*tensors, out_dtype)
    return torch.ops.rtlynx.sparse_linear(*tensors, out_dtype)  # type: ignore[no-any-return]


# ---- validation -------------------------------------------------------------------------------------------------------------------------
# It runs before every launch: what it builds in words it builds only to refuse.


def _check(op: str, argument: str, tensor: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
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


def _check_dtype(op: str, argument: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuse what cannot be T on this device."""
    if dtype in _KERNEL_DTYPES:
        return
    on_cpu = device.type == "cpu"
    if not (on_cpu and dtype is torch.float32):
        expected = "bfloat16, float16 or float32" if on_cpu else "bfloat16 or float16"
        raise InvalidArgumentError(op, argument, f"dtype {dtype} on {device.type}", f"{expected} there")


def _check_rank(op: str, argument: str, rank: int) -> None:
    if rank % RANK_MULTIPLE or not 0 < rank <= MAX_RANK:
        raise InvalidArgumentError(op, argument, f"rank {rank}", f"a multiple of {RANK_MULTIPLE} from {RANK_MULTIPLE} to {MAX_RANK}")


def _check_sparsify(
    x: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    branch_input: str,
    values_dtype: torch.dtype | None,
    values_scale: float,
) -> None:
    op = "sparsify"
    if x.dim() != 2:
        raise InvalidArgumentError(op, "x", f"{x.dim()} dimensions", "2 dimensions (M, K)")
    _check_dtype(op, "x", x.dtype, x.device)
    k = x.shape[1]
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(op, "x", f"K = {k}", f"K a positive multiple of {K_MULTIPLE}")
    if score is not None:
        _check(op, "score", score, (k,), torch.float32, x.device)
    if shift is not None:
        _check(op, "shift", shift, (k,), torch.float32, x.device)
    if comp_down is not None:
        _check(op, "comp_down", comp_down, (k, None), x.dtype, x.device)
        _check_rank(op, "comp_down", comp_down.shape[1])
    if branch_input not in ("input", "dropped"):
        raise InvalidArgumentError(op, "branch_input", repr(branch_input), "'input' or 'dropped'")
    if values_dtype is None:
        if values_scale != 1:
            raise InvalidArgumentError(op, "values_scale", values_scale, "1, since `values_dtype` is None")
    elif values_dtype is not E4M3:
        raise InvalidArgumentError(op, "values_dtype", values_dtype, f"None or {E4M3}")
    elif not 0 < values_scale < float("inf"):
        raise InvalidArgumentError(op, "values_scale", values_scale, "a positive finite number")


def _check_sparse_linear(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Refuse what does not fit; returns T."""
    op = "sparse_linear"
    if values.dim() != 2:
        raise InvalidArgumentError(op, "values", f"{values.dim()} dimensions", "2 dimensions (M, K/2)")
    device = values.device
    if values.dtype is E4M3:
        if out_dtype is None:
            raise InvalidArgumentError(op, "out_dtype", None, "the dtype of the output, since `values` are e4m3")
        _check_dtype(op, "out_dtype", out_dtype, device)
        dtype = out_dtype
    else:
        _check_dtype(op, "values", values.dtype, device)
        for argument, given in (("weight_scale", weight_scale), ("out_dtype", out_dtype)):
            if given is not None:
                got = given if argument == "out_dtype" else "a tensor"
                raise InvalidArgumentError(op, argument, got, f"None, since `values` are {values.dtype}")
        dtype = values.dtype
    m, half = values.shape
    k = 2 * half
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(op, "values", f"K/2 = {half}", f"K a positive multiple of {K_MULTIPLE}")
    _check(op, "metadata", metadata, metadata_shape(m, k), torch.int32, device)
    _check(op, "weight", weight, (None, k), values.dtype, device)
    n = weight.shape[0]
    if n == 0 or n % N_MULTIPLE:
        raise InvalidArgumentError(op, "weight", f"N = {n}", f"N a positive multiple of {N_MULTIPLE}")
    if values.dtype is E4M3:
        if weight_scale is None:
            raise InvalidArgumentError(op, "weight_scale", None, "a tensor, since `values` are e4m3")
        _check(op, "weight_scale", weight_scale, (n,), torch.float32, device)
    if row_scale is not None:
        _check(op, "row_scale", row_scale, (m,), torch.float32, device)
    if (branch is None) != (comp_up is None):
        absent, present = ("branch", "comp_up") if branch is None else ("comp_up", "branch")
        raise InvalidArgumentError(op, absent, "None", f"a tensor, since `{present}` is given")
    if branch is not None and comp_up is not None:
        _check(op, "branch", branch, (m, None), dtype, device)
        rank = branch.shape[1]
        _check_rank(op, "branch", rank)
        _check(op, "comp_up", comp_up, (n, rank), dtype, device)
    if bias is not None:
        _check(op, "bias", bias, (n,), dtype, device)
    return dtype


def _pointer(op: str, argument: str, tensor: Tensor | None) -> int:
    """The address of a contiguous, 16-byte aligned tensor; 0 for none."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise InvalidArgumentError(op, argument, f"strides {tensor.stride()} for shape {tuple(tensor.shape)}", "a contiguous tensor")
    address = tensor.data_ptr()
    if address % _ALIGNMENT:
        raise InvalidArgumentError(op, argument, f"address {address:#x}", f"a multiple of {_ALIGNMENT}")
    return address


def _stream(device_index: int) -> int:
    """The handle of torch's current stream, without the object that `torch.cuda.current_stream` makes around it."""
    return torch._C._cuda_getCurrentRawStream(device_index)


@functools.cache
def _core() -> ModuleType:
    """The compiled extension, imported when the first CUDA tensor arrives, with what `rtlynx.autotune` saved for this machine's GPUs."""
    try:
        from rtlynx import _core as core
    except ImportError as error:
        raise DeviceError(f"rtlynx._core is not built ({error}); install the package with `pip install .`") from error
    plans.use_saved(core)
    return core


# ---- sparsify ---------------------------------------------------------------------------------------------------------------------------


def _sparsify_cpu(
    x: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
) -> Sparsified:
    _check_sparsify(x, score, shift, comp_down, branch_input, values_dtype, values_scale)
    return reference.sparsify(x, score, shift, comp_down, branch_input, norm_compensation, eps, values_dtype, values_scale)


def _sparsify_outputs(x: Tensor, comp_down: Tensor | None, norm_compensation: bool, values_dtype: torch.dtype | None) -> Sparsified:
    m, k = x.shape
    return Sparsified(
        x.new_empty(m, k // 2, dtype=values_dtype),
        x.new_empty(*metadata_shape(m, k), dtype=torch.int32),
        x.new_empty(m if norm_compensation else 0, dtype=torch.float32),
        x.new_empty(m, 0 if comp_down is None else comp_down.shape[1]),
    )


def _sparsify_fake(
    x: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
) -> Sparsified:
    _check_sparsify(x, score, shift, comp_down, branch_input, values_dtype, values_scale)
    share_selections()
    return _sparsify_outputs(x, comp_down, norm_compensation, values_dtype)


def _rows_readable(x: Tensor) -> bool:
    """Whether the kernel can read the rows of x in place: unit stride inside a row, every row 16-byte aligned."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and row * x.element_size() % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0


def _sparsify_cuda(
    x: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
) -> Sparsified:
    op = "sparsify"
    _check_sparsify(x, score, shift, comp_down, branch_input, values_dtype, values_scale)
    if not _rows_readable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    out = _sparsify_outputs(x, comp_down, norm_compensation, values_dtype)
    m, k = x.shape
    if m == 0:
        return out
    values, metadata, row_scale, branch = out
    rank = branch.shape[1]
    device_index = x.get_device()
    _core().sparsify(
        device_index=device_index,
        stream=_stream(device_index),
        dtype=kernel_dtype(x.dtype, values_dtype),
        m=m,
        k=k,
        ldx=x.stride(0),
        rank=rank,
        x=x.data_ptr(),
        score=_pointer(op, "score", score),
        shift=_pointer(op, "shift", shift),
        comp_down=_pointer(op, "comp_down", comp_down),
        values=values.data_ptr(),
        metadata=metadata.data_ptr(),
        row_scale=row_scale.data_ptr() if norm_compensation else 0,
        branch=branch.data_ptr() if rank else 0,
        branch_of_dropped=branch_input == "dropped",
        eps=eps,
        values_scale=values_scale,
    )
    return out


def _sparsify_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, shift, comp_down, branch_input, _, _, values_dtype, _ = inputs
    _, metadata, _, _ = output
    ctx.save_for_backward(x, shift, comp_down, metadata)
    ctx.branch_input, ctx.values_dtype = branch_input, values_dtype


def _sparsify_backward(
    ctx: Any, grad_values: Tensor, _metadata: Tensor, _row_scale: Tensor, grad_branch: Tensor
) -> tuple[Tensor | None, ...]:
    _refuse_fp8_gradient("sparsify", ctx.values_dtype)
    x, shift, comp_down, metadata = ctx.saved_tensors
    m, k = x.shape
    columns = reference.kept_columns(metadata, m, k)
    grad_x = torch.zeros_like(x).scatter_(1, columns, grad_values)
    grad_down = None
    if comp_down is not None:
        z = reference.shifted(x, shift)
        grad_z = grad_branch @ comp_down.T
        if ctx.branch_input == "dropped":
            z, grad_z = z.scatter(1, columns, 0), grad_z.scatter(1, columns, 0)
        grad_x = grad_x + grad_z
        grad_down = z.T @ grad_branch
    grad_shift = -grad_x.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_shift, grad_down, *[None] * 5


def _refuse_fp8_gradient(op: str, values_dtype: torch.dtype | None) -> None:
    """Rounding to e4m3 passes no gradient on, and one without what went through it would be wrong without a word."""
    if values_dtype is E4M3:
        expected = 'no gradient, or precision="model" while training'
        raise InvalidArgumentError(op, "values", "a gradient through e4m3 values (fp8)", expected)


# ---- sparse_linear ----------------------------------------------------------------------------------------------------------------------


def _sparse_linear_cpu(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_sparse_linear(values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype)
    return reference.sparse_linear(values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype)


def _sparse_linear_fake(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = _check_sparse_linear(values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype)
    return values.new_empty(values.shape[0], weight.shape[0], dtype=dtype)


def _sparse_linear_cuda(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "sparse_linear"
    dtype = _check_sparse_linear(values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype)
    m = values.shape[0]
    n, k = weight.shape
    out = values.new_empty(m, n, dtype=dtype)
    if m == 0:
        return out
    device_index = values.get_device()
    _core().sparse_linear(
        device_index=device_index,
        stream=_stream(device_index),
        dtype=kernel_dtype(dtype, values.dtype),
        m=m,
        n=n,
        k=k,
        rank=0 if branch is None else branch.shape[1],
        values=_pointer(op, "values", values),
        metadata=_pointer(op, "metadata", metadata),
        weight=_pointer(op, "weight", weight),
        row_scale=_pointer(op, "row_scale", row_scale),
        branch=_pointer(op, "branch", branch),
        comp_up=_pointer(op, "comp_up", comp_up),
        bias=_pointer(op, "bias", bias),
        out=out.data_ptr(),
        weight_scale=_pointer(op, "weight_scale", weight_scale),
    )
    return out


def _sparse_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, metadata, weight, row_scale, branch, comp_up, *_ = inputs
    ctx.save_for_backward(values, metadata, weight, row_scale, branch, comp_up)


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, metadata, weight, row_scale, branch, comp_up = ctx.saved_tensors
    _refuse_fp8_gradient("sparse_linear", values.dtype)
    needs_values, _, needs_weight, _, needs_branch, needs_up, needs_bias = ctx.needs_input_grad[:7]
    scaled = grad if row_scale is None else (grad * row_scale[:, None]).to(grad.dtype)
    grad_values = grad_weight = grad_branch = grad_up = grad_bias = None
    if needs_values:
        m, half = values.shape
        grad_values = (scaled @ weight).gather(1, reference.kept_columns(metadata, m, half * 2))
    if needs_weight:
        grad_weight = scaled.T @ reference.decompress(values, metadata)
    if needs_branch:
        grad_branch = grad @ comp_up
    if needs_up:
        grad_up = grad.T @ branch
    if needs_bias:
        grad_bias = grad.sum(0)
    return grad_values, None, grad_weight, None, grad_branch, grad_up, grad_bias, None, None


# ---- registration -----------------------------------------------------------------------------------------------------------------------

_library.impl("sparsify", _sparsify_cpu, "CPU")
_library.impl("sparsify", _sparsify_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparsify", _sparsify_fake, lib=_library)
torch.library.register_autograd("rtlynx::sparsify", _sparsify_backward, setup_context=_sparsify_setup, lib=_library)

_library.impl("sparse_linear", _sparse_linear_cpu, "CPU")
_library.impl("sparse_linear", _sparse_linear_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparse_linear", _sparse_linear_fake, lib=_library)
torch.library.register_autograd("rtlynx::sparse_linear", _sparse_linear_backward, setup_context=_sparse_linear_setup, lib=_library)
