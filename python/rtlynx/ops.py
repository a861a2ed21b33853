"""The two torch custom ops everything else is built from: ``rtlynx::sparsify`` and ``rtlynx::sparse_linear``.

CPU tensors run `rtlynx.reference`, which defines the semantics; CUDA tensors run the kernels through ``rtlynx._core``. Both are traced by
``torch.compile`` (fake implementations, dynamic M) and, but for fp8, differentiable. An op holds no state: memory comes from torch's
allocator, work goes to torch's current stream of the tensors' device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtlynx import checks, into, launch, reference  # noqa: F401 - `into` registers the ops that compiled code calls
from rtlynx.activations import selection_does
from rtlynx.direct import direct
from rtlynx.errors import InvalidArgumentError
from rtlynx.inductor import teach
from rtlynx.reference import E4M3, EPS, Activation, BranchInput, Sparsified, metadata_shape

__all__ = ["Sparsified", "sparse_linear", "sparsify"]

_library = torch.library.Library("rtlynx", "DEF")
_library.define(
    "sparsify(Tensor x, Tensor? score, Tensor? shift, Tensor? comp_down, str branch_input, bool norm_compensation, float eps,"
    ' ScalarType? values_dtype=None, float values_scale=1.0, str activation="none", Tensor? gate=None, Tensor? head=None,'
    " Tensor? norm_stats=None, Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? places=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "sparse_linear(Tensor values, Tensor metadata, Tensor weight, Tensor? row_scale, Tensor? branch, Tensor? comp_up, Tensor? bias,"
    ' Tensor? weight_scale=None, ScalarType? out_dtype=None, str activation="none", Tensor? residual=None, Tensor? gate=None) -> Tensor'
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
    activation: Activation = "none",
    gate: Tensor | None = None,
    head: Tensor | None = None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Sparsified:
    """Keep the 2 largest of every 4 channels of each token and compress them; in the same pass measure the row and feed the branch.

    With ``X = cat([head, act(x)], 1)`` (act in float32, rounded to T; without `activation` and `head` it is x), its channels gathered by
    `places`, or with `norm_stats` ``X = (x - mean) · rstd · norm_weight + norm_bias`` (likewise), ``X' = X - shift`` (float32, rounded to
    T), ``S`` the selection by ``|X'|·score`` and ``s`` the row scale::

        s      = sqrt(‖X'‖² / (‖S(X')‖² + eps))        norm compensation of RT-Lynx (arXiv 2605.26632); 1 when it is off
        branch = X' · comp_down                        branch_input = "input": the paper's branch
               = (X' - S(X')) · comp_down              branch_input = "dropped": split, a branch on what selection dropped

    Args:
        x: ``(M, K - K0)`` of dtype T: bfloat16 or float16, also float32 on the CPU. K and K0 multiples of 64, K0 the channels of `head`
            (0 without it), any M ≥ 0. Copied if its last dimension is strided or its rows are not 16-byte aligned; a strided first
            dimension is read in place. The same goes for `gate` and `head`.
        score: optional ``(K,)`` float32 factor on the magnitudes that selection compares. Values are stored without it.
        shift: optional ``(K,)`` float32 vector subtracted first; add ``shift · Wᵀ`` to the bias.
        comp_down: optional ``(K, r)`` of dtype T, r a multiple of 16 up to 128; row k holds the coefficients of channel k.
        branch_input: ``"dropped"`` or ``"input"``; without `comp_down` it says nothing.
        norm_compensation: whether to compute the row scale.
        eps: ε of the row scale, finite and at least 0.
        values_dtype: ``torch.float8_e4m3fn`` to store the kept values in fp8; None: in T. Selection, row scale and branch are the same.
        values_scale: what kept values are multiplied by before they are rounded to fp8; 1 without fp8.
        activation: what is done to x before: ``"none"``, ``"gelu_tanh"`` (GELU in its tanh approximation), ``"gelu"`` (by erf), or
            ``"silu_gate"`` (``silu(x) · gate``). `head` is taken as it is.
        gate: ``(M, K - K0)`` of dtype T with ``"silu_gate"``, else None.
        head: optional ``(M, K0)`` of dtype T, the channels before those of x.
        norm_stats: optional ``(M, 2)`` float32, mean and rstd of each row of x (see `rtlynx.row_stats.row_stats`); without `activation`,
            `head` and `places` only.
        norm_weight: optional ``(B, K)`` of dtype T, B a divisor of M, or ``(K,)``: M / B neighbouring rows of x share a row of it. None: 1.
            Copied if it is not contiguous, as `norm_bias` is.
        norm_bias: optional, of the same shape; None: 0.
        places: optional ``(K,)`` uint8 that gathers the channels of X first, see `rtlynx.reference.permutation_of`; `score`, `shift`,
            `comp_down` and all that is returned are in the gathered order. What is no such permutation gives a result of no meaning.

    Returns:
        `Sparsified`: values ``(M, K/2)``, metadata int32, row_scale ``(M,)`` float32 (``(0,)`` when off), branch ``(M, r)`` (``(M, 0)``
        without).

    Ties go to the lower channel. NaN ranks above infinity and is kept, so a non-finite token gives a non-finite row. An all-zero row has
    scale 0. The gradient passes straight through the mask; the row scale is a constant to it. In fp8 an infinity saturates at ±448 (its
    row scale is NaN all the same), NaN stays NaN, and there is no gradient: see `sparse_linear`.

    Raises:
        InvalidArgumentError: a dtype, shape, device or `eps` does not fit, or one of `score`, `shift`, `comp_down`, `norm_stats` and
            `places` is not contiguous; nothing has been launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    selection = score, shift, comp_down, branch_input, norm_compensation, eps, values_dtype, values_scale
    norm = norm_stats, _as_rows(norm_weight), _as_rows(norm_bias)
    arguments = x, *selection, activation, gate, head, *norm, places
    if direct(x, score, shift, comp_down, gate, head, *norm, places):
        return _sparsify_cuda(*arguments)
    return Sparsified(*torch.ops.rtlynx.sparsify(*arguments))


def _as_rows(vector: Tensor | None) -> Tensor | None:
    """``(K,)`` as ``(1, K)``."""
    return vector[None] if vector is not None and vector.dim() == 1 else vector


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
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``row_scale · (S(X) · weightᵀ) · weight_scale + branch · comp_upᵀ + bias`` on sparse tensor cores, summed in float32.

    That is y, rounded to T. What a block does next may be done before it is written, each step in float32 and rounded once to T::

        z   = gelu_tanh(y)              activation = "gelu_tanh"; else y
        out = residual + gate · z       with a residual; else z

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
        activation: ``"none"`` or ``"gelu_tanh"``, GELU in its tanh approximation.
        residual: optional ``(M, N)`` of dtype T.
        gate: optional ``(B, N)`` of dtype T, where B divides M: row r of z is multiplied by row ``r // (M / B)``; needs `residual`.

    Returns:
        ``(M, N)`` of dtype T.

    A backward pass through `activation` or `gate` computes y again. With e4m3 values only `residual` and `gate` have gradients: where
    another input requires one, the backward pass raises instead of leaving out what went through the rounding. ``torch.compile`` traces a
    backward pass ahead of time, so it needs ``torch.no_grad()`` there.

    Raises:
        InvalidArgumentError: a dtype, shape or device does not fit, or a tensor is not contiguous; nothing has been launched.
        DeviceError: the GPU path cannot run on this machine.
    """
    tensors = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale
    if direct(*tensors, residual, gate):
        return _sparse_linear_cuda(*tensors, out_dtype, activation, residual, gate)
    return torch.ops.rtlynx.sparse_linear(*tensors, out_dtype, activation, residual, gate)  # type: ignore[no-any-return]


# ---- sparsify ---------------------------------------------------------------------------------------------------------------------------


_SPARSIFY_IN_ORDER = ("score", "shift", "comp_down", "norm_stats", "places")


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
    activation: Activation = "none",
    gate: Tensor | None = None,
    head: Tensor | None = None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Sparsified:
    before = activation, gate, head, norm_stats, norm_weight, norm_bias, places
    checks.check_sparsify(x, score, shift, comp_down, branch_input, eps, values_dtype, values_scale, *before)
    checks.check_contiguous("sparsify", _SPARSIFY_IN_ORDER, (score, shift, comp_down, norm_stats, places))
    selection = score, shift, comp_down, branch_input, norm_compensation, eps, values_dtype, values_scale
    return reference.sparsify(x, *selection, *before)


def _sparsify_outputs(x: Tensor, k: int, comp_down: Tensor | None, norm_compensation: bool, values_dtype: torch.dtype | None) -> Sparsified:
    m = x.shape[0]
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
    activation: Activation = "none",
    gate: Tensor | None = None,
    head: Tensor | None = None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Sparsified:
    before = activation, gate, head, norm_stats, norm_weight, norm_bias, places
    k = checks.check_sparsify(x, score, shift, comp_down, branch_input, eps, values_dtype, values_scale, *before)
    teach()
    return _sparsify_outputs(x, k, comp_down, norm_compensation, values_dtype)


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
    activation: Activation = "none",
    gate: Tensor | None = None,
    head: Tensor | None = None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Sparsified:
    before = activation, gate, head, norm_stats, norm_weight, norm_bias, places
    k = checks.check_sparsify(x, score, shift, comp_down, branch_input, eps, values_dtype, values_scale, *before)
    checks.check_contiguous("sparsify", _SPARSIFY_IN_ORDER, (score, shift, comp_down, norm_stats, places))
    if (activation != "none" or head is not None) and (activation == "none" or not selection_does(x.device, activation)):
        x, activation, gate, head = reference.activated(x, activation, gate, head), "none", None, None
    out = _sparsify_outputs(x, k, comp_down, norm_compensation, values_dtype)
    values, metadata, row_scale, branch = out
    launch.sparsify(
        x,
        gate,
        head,
        score,
        shift,
        comp_down,
        values,
        metadata,
        row_scale if norm_compensation else None,
        None if comp_down is None else branch,
        branch_input == "dropped",
        eps,
        values_scale,
        activation,
        norm_stats,
        norm_weight,
        norm_bias,
        places,
    )
    return out


def _sparsify_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, shift, comp_down, branch_input, _, _, values_dtype, _, activation, gate, head, *norm, places = inputs
    _, metadata, _, _ = output
    ctx.save_for_backward(x, shift, comp_down, gate, head, places, metadata, *norm)  # activation and norm are computed again, not kept
    ctx.branch_input, ctx.values_dtype, ctx.activation = branch_input, values_dtype, activation


def _sparsify_backward(
    ctx: Any, grad_values: Tensor, _metadata: Tensor, _row_scale: Tensor, grad_branch: Tensor
) -> tuple[Tensor | None, ...]:
    _refuse_fp8_gradient("sparsify", ctx.values_dtype)
    x, shift, comp_down, gate, head, places, metadata, *norm = ctx.saved_tensors
    m, half = grad_values.shape
    columns = reference.kept_columns(metadata, m, half * 2)
    grad = grad_values.new_zeros(m, half * 2).scatter_(1, columns, grad_values)
    grad_down = None
    if comp_down is not None:
        z = reference.activated(reference.normed(x, *norm), ctx.activation, gate, head)
        z = reference.shifted(reference.gathered(z, places), shift)
        grad_z = grad_branch @ comp_down.T
        if ctx.branch_input == "dropped":
            z, grad_z = z.scatter(1, columns, 0), grad_z.scatter(1, columns, 0)
        grad = grad + grad_z
        grad_down = z.T @ grad_branch
    grad_shift = -grad.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
    if places is not None:
        grad = torch.empty_like(grad).index_copy(1, reference.permutation_of(places), grad)
    grad_x, grad_gate, grad_head = reference.activated_backward(grad, x, ctx.activation, gate, head)
    grad_norm: list[Tensor | None] = [None] * 3
    if norm[0] is not None:
        grad_x, *grad_norm = reference.normed_backward(grad_x, x, *norm)
    return grad_x, None, grad_shift, grad_down, *[None] * 6, grad_gate, grad_head, *grad_norm, None


def _refuse_fp8_gradient(op: str, values_dtype: torch.dtype | None) -> None:
    """Rounding to e4m3 passes no gradient on, and one without what went through it would be wrong without a word."""
    if values_dtype is E4M3:
        expected = 'no gradient, or precision="model" while training'
        raise InvalidArgumentError(op, "values", "a gradient through e4m3 values (fp8)", expected)


# ---- sparse_linear ----------------------------------------------------------------------------------------------------------------------


_SPARSE_LINEAR_TENSORS = ("values", "metadata", "weight", "row_scale", "branch", "comp_up", "bias", "weight_scale", "residual", "gate")


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
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    product = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype
    checks.check_sparse_linear(*product, activation, residual, gate)
    checks.check_contiguous("sparse_linear", _SPARSE_LINEAR_TENSORS, (*product[:-1], residual, gate))
    return reference.sparse_linear(*product, activation, residual, gate)


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
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    product = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype
    dtype = checks.check_sparse_linear(*product, activation, residual, gate)
    teach()
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
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    tensors = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale
    dtype = checks.check_sparse_linear(*tensors, out_dtype, activation, residual, gate)
    checks.check_contiguous("sparse_linear", _SPARSE_LINEAR_TENSORS, (*tensors, residual, gate))
    out = values.new_empty(values.shape[0], weight.shape[0], dtype=dtype)
    launch.sparse_linear(*tensors, out, activation, residual, gate)
    return out


def _sparse_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out_dtype, activation, residual, gate = inputs
    finished = activation != "none" or gate is not None  # the backward pass needs y then: bias and scale as well
    ctx.save_for_backward(values, metadata, weight, row_scale, branch, comp_up, *((bias, weight_scale) if finished else (None, None)), gate)
    ctx.out_dtype, ctx.activation, ctx.has_residual = out_dtype, activation, residual is not None


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, gate = ctx.saved_tensors
    needs_values, _, needs_weight, _, needs_branch, needs_up, needs_bias, *_ = ctx.needs_input_grad
    if any(ctx.needs_input_grad[:8]):
        _refuse_fp8_gradient("sparse_linear", values.dtype)
    grad_residual, grad_gate = grad if ctx.has_residual else None, None
    if ctx.activation != "none" or gate is not None:
        product = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, ctx.out_dtype
        y = torch.ops.rtlynx.sparse_linear(*product)
        grad, grad_gate = reference.finished_backward(grad, y, ctx.activation, gate)
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
    return grad_values, None, grad_weight, None, grad_branch, grad_up, grad_bias, None, None, None, grad_residual, grad_gate


# ---- registration -----------------------------------------------------------------------------------------------------------------------

_library.impl("sparsify", _sparsify_cpu, "CPU")
_library.impl("sparsify", _sparsify_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparsify", _sparsify_fake, lib=_library)
torch.library.register_autograd("rtlynx::sparsify", _sparsify_backward, setup_context=_sparsify_setup, lib=_library)

_library.impl("sparse_linear", _sparse_linear_cpu, "CPU")
_library.impl("sparse_linear", _sparse_linear_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparse_linear", _sparse_linear_fake, lib=_library)
torch.library.register_autograd("rtlynx::sparse_linear", _sparse_linear_backward, setup_context=_sparse_linear_setup, lib=_library)
