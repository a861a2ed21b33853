"""The whole layer as one op, ``rtlynx::fused_linear``: what `rtlynx.ops.sparsify` and `rtlynx.ops.sparse_linear` compute together.

On a GPU it is one kernel, the design of the RT-Lynx paper (arXiv 2605.26632): selection happens in registers inside the product, and the
compressed activation never reaches memory. It repeats the selection for every tile of output columns, so the two ops are faster for wide
layers. CPU tensors run `rtlynx.reference`. Like the other ops it holds no state, works on torch's current stream and is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx import checks, launch, ops, reference
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import kernel_dtype
from rtlynx.reference import EPS, K_MULTIPLE, N_MULTIPLE, BranchInput

__all__ = ["fused_linear"]

_OP = "fused_linear"
_IN_ORDER = ("weight", "score", "shift", "comp_down", "comp_up", "bias")
_COUNTED_ROWS = 64  # the kernel counts its progress by tiles of at least as many rows
_MAX_STRIDE = 2**31 - 512  # what the kernel can step from row to row

_library = torch.library.Library("rtlynx", "FRAGMENT")
_library.define(
    "fused_linear(Tensor x, Tensor weight, Tensor? score, Tensor? shift, Tensor? comp_down, Tensor? comp_up, Tensor? bias,"
    " str branch_input, bool norm_compensation, float eps) -> Tensor"
)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None = None,
    shift: Tensor | None = None,
    comp_down: Tensor | None = None,
    comp_up: Tensor | None = None,
    bias: Tensor | None = None,
    branch_input: BranchInput = "dropped",
    norm_compensation: bool = True,
    eps: float = EPS,
) -> Tensor:
    """``s · (S(X') · weightᵀ) + T · comp_upᵀ + bias`` in one kernel; X', S, s and T as in `rtlynx.ops.sparsify`.

    The selection is that of `rtlynx.ops.sparsify` bit for bit; sums run in another order, and T is rounded as there.

    Args:
        x: ``(M, K)`` of dtype T: bfloat16 or float16, also float32 on the CPU. K a multiple of 64, any M ≥ 0. Copied if its last dimension
            is strided or its rows are not 16-byte aligned; a strided first dimension is read in place.
        weight: ``(N, K)`` of dtype T, the dense weight in nn.Linear's layout. N a multiple of 8.
        score: optional ``(K,)`` float32 factor on the magnitudes that selection compares.
        shift: optional ``(K,)`` float32 vector subtracted first; add ``shift · weightᵀ`` to the bias.
        comp_down: optional ``(K, r)`` of dtype T, r a multiple of 16 up to 128; needs `comp_up`.
        comp_up: optional ``(N, r)`` of dtype T; needs `comp_down`.
        bias: optional ``(N,)`` of dtype T.
        branch_input: ``"dropped"`` or ``"input"``; without `comp_down` it says nothing.
        norm_compensation: whether rows are scaled by s.
        eps: ε of s, finite and at least 0.

    Returns:
        ``(M, N)`` of dtype T.

    The gradient passes straight through the mask; s is a constant to it. The backward pass selects again, with the two ops.

    Raises:
        InvalidArgumentError: a dtype, shape, device or `eps` does not fit, or a tensor other than x is not contiguous; nothing has been
            launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    return torch.ops.rtlynx.fused_linear(  # type: ignore[no-any-return]
        x, weight, score, shift, comp_down, comp_up, bias, branch_input, norm_compensation, eps
    )


def _check(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    branch_input: str,
    eps: float,
) -> None:
    if x.dim() != 2:
        raise InvalidArgumentError(_OP, "x", f"{x.dim()} dimensions", "2 dimensions (M, K)")
    checks.check_dtype(_OP, "x", x.dtype, x.device)
    k = x.shape[1]
    if k == 0 or k % K_MULTIPLE:
        raise InvalidArgumentError(_OP, "x", f"K = {k}", f"K a positive multiple of {K_MULTIPLE}")
    checks.check(_OP, "weight", weight, (None, k), x.dtype, x.device)
    n = weight.shape[0]
    if n == 0 or n % N_MULTIPLE:
        raise InvalidArgumentError(_OP, "weight", f"N = {n}", f"N a positive multiple of {N_MULTIPLE}")
    for name, vector in (("score", score), ("shift", shift)):
        if vector is not None:
            checks.check(_OP, name, vector, (k,), torch.float32, x.device)
    if (comp_down is None) != (comp_up is None):
        absent, present = ("comp_down", "comp_up") if comp_down is None else ("comp_up", "comp_down")
        raise InvalidArgumentError(_OP, absent, "None", f"a tensor, since `{present}` is given")
    if comp_down is not None and comp_up is not None:
        checks.check(_OP, "comp_down", comp_down, (k, None), x.dtype, x.device)
        checks.check_rank(_OP, "comp_down", comp_down.shape[1])
        checks.check(_OP, "comp_up", comp_up, (n, comp_down.shape[1]), x.dtype, x.device)
    if bias is not None:
        checks.check(_OP, "bias", bias, (n,), x.dtype, x.device)
    if branch_input not in ("input", "dropped"):
        raise InvalidArgumentError(_OP, "branch_input", repr(branch_input), "'input' or 'dropped'")
    checks.check_eps(_OP, eps)


def _cpu(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
) -> Tensor:
    _check(x, weight, score, shift, comp_down, comp_up, bias, branch_input, eps)
    checks.check_contiguous(_OP, _IN_ORDER, (weight, score, shift, comp_down, comp_up, bias))
    sparse = reference.sparsify(x, score, shift, comp_down, branch_input, norm_compensation, eps)
    return reference.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale, sparse.branch, comp_up, bias)


def _fake(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
) -> Tensor:
    _check(x, weight, score, shift, comp_down, comp_up, bias, branch_input, eps)
    return x.new_empty(x.shape[0], weight.shape[0])


def _cuda(
    x: Tensor,
    weight: Tensor,
    score: Tensor | None,
    shift: Tensor | None,
    comp_down: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    branch_input: BranchInput,
    norm_compensation: bool,
    eps: float,
) -> Tensor:
    _check(x, weight, score, shift, comp_down, comp_up, bias, branch_input, eps)
    checks.check_contiguous(_OP, _IN_ORDER, (weight, score, shift, comp_down, comp_up, bias))
    if not checks.rows_readable(x) or x.stride(0) > _MAX_STRIDE:
        x = x.clone(memory_format=torch.contiguous_format)
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty(m, n)
    if m == 0:
        return out
    rank = 0 if comp_down is None else comp_down.shape[1]
    branch = x.new_empty(m, rank) if rank else None
    progress = x.new_zeros(1 + -(-m // _COUNTED_ROWS), dtype=torch.int32) if rank else None
    device_index = x.get_device()
    launch.core().fused_linear(
        device_index=device_index,
        stream=launch.stream(device_index),
        dtype=kernel_dtype(x.dtype),
        m=m,
        n=n,
        k=k,
        ldx=x.stride(0),
        rank=rank,
        x=x.data_ptr(),
        score=launch.address(score),
        shift=launch.address(shift),
        comp_down=launch.address(comp_down),
        weight=launch.address(weight),
        comp_up=launch.address(comp_up),
        bias=launch.address(bias),
        branch=launch.address(branch),
        progress=launch.address(progress),
        out=out.data_ptr(),
        branch_of_dropped=branch_input == "dropped",
        norm_compensation=norm_compensation,
        eps=eps,
    )
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    leaves: list[Any] = [
        None if tensor is None else tensor.detach().requires_grad_(needed)
        for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:7], strict=True)
    ]
    x, weight, score, shift, comp_down, comp_up, bias = leaves
    _, norm_compensation, _ = ctx.options
    with torch.enable_grad():
        values, metadata, row_scale, branch = ops.sparsify(x, score, shift, comp_down, *ctx.options)
        scale = row_scale if norm_compensation else None
        out = ops.sparse_linear(values, metadata, weight, scale, None if comp_down is None else branch, comp_up, bias)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    return (*(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves), None, None, None)


_library.impl("fused_linear", _cpu, "CPU")
_library.impl("fused_linear", _cuda, "CUDA")
torch.library.register_fake("rtlynx::fused_linear", _fake, lib=_library)
torch.library.register_autograd("rtlynx::fused_linear", _backward, setup_context=_setup, lib=_library)
