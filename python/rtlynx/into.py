"""Ops as compiled code calls them: ``rtlynx::sparsify_into``, ``sparse_linear_into``, ``norm_rotary_into`` write into memory that is there.

`rtlynx.inductor` puts them in the place of `rtlynx.ops`' when it lowers a graph. The arguments were checked while it was traced, and the
outputs are inductor's, which plans memory better than an allocation in every call: what is left is the launch. Without gradients, and
not for users: nothing is checked here but what `rtlynx.launch` says.

The Python that inductor writes calls the functions of `FUNCTIONS`, without the ops around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx import launch, reference, reference_rotary

# New arguments come last, with defaults, in the schemas and in the functions behind them, and no name of `FUNCTIONS` goes away. Code that
# inductor has cached calls what there was when it was compiled: the key of its cache holds the versions of torch and triton, not rtlynx's.
_library = torch.library.Library("rtlynx", "FRAGMENT")
_library.define(
    "sparsify_into(Tensor x, Tensor? gate, Tensor? head, Tensor? score, Tensor? shift, Tensor? comp_down, Tensor(a!) values,"
    " Tensor(b!) metadata, Tensor(c!)? row_scale, Tensor(d!)? branch, bool branch_of_dropped, float eps, float values_scale,"
    " str activation, Tensor? norm_stats=None, Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? places=None) -> ()"
)
_library.define(
    "sparse_linear_into(Tensor values, Tensor metadata, Tensor weight, Tensor? row_scale, Tensor? branch, Tensor? comp_up, Tensor? bias,"
    ' Tensor? weight_scale, Tensor(a!) out, str activation="none", Tensor? residual=None, Tensor? gate=None) -> ()'
)
_library.define(
    "norm_rotary_into(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps, Tensor? first, Tensor? first_weight, float first_eps,"
    " Tensor(a!) out) -> ()"
)


def sparsify_cpu(
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
    activation: reference.Activation,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    branch_input: reference.BranchInput = "dropped" if branch_of_dropped else "input"
    values_dtype = None if values.dtype == x.dtype else values.dtype
    selection = score, shift, comp_down, branch_input, row_scale is not None, eps, values_dtype, values_scale
    before = activation, gate, head, norm_stats, norm_weight, norm_bias, places
    for into, computed in zip((values, metadata, row_scale, branch), reference.sparsify(x, *selection, *before), strict=True):
        if into is not None:
            into.copy_(computed)


def sparse_linear_cpu(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    branch: Tensor | None,
    comp_up: Tensor | None,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    out: Tensor,
    activation: reference.Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    product = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, None if out.dtype == values.dtype else out.dtype
    out.copy_(reference.sparse_linear(*product, activation, residual, gate))


def norm_rotary_cpu(
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
    out.copy_(reference_rotary.norm_rotary(x, cos, sin, weight, eps, first, first_weight, first_eps))


sparsify_cuda, sparse_linear_cuda, norm_rotary_cuda = launch.sparsify, launch.sparse_linear, launch.norm_rotary

FUNCTIONS = {
    (torch.ops.rtlynx.sparsify_into.default, "cpu"): "sparsify_cpu",
    (torch.ops.rtlynx.sparsify_into.default, "cuda"): "sparsify_cuda",
    (torch.ops.rtlynx.sparse_linear_into.default, "cpu"): "sparse_linear_cpu",
    (torch.ops.rtlynx.sparse_linear_into.default, "cuda"): "sparse_linear_cuda",
    (torch.ops.rtlynx.norm_rotary_into.default, "cpu"): "norm_rotary_cpu",
    (torch.ops.rtlynx.norm_rotary_into.default, "cuda"): "norm_rotary_cuda",
}
"""Op and type of device → what compiled code calls: the name of a function of this module with the op's arguments."""


def _nothing(*_arguments: object) -> None:
    """What a trace sees of an op that returns nothing."""


_library.impl("sparsify_into", sparsify_cpu, "CPU")
_library.impl("sparsify_into", sparsify_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparsify_into", _nothing, lib=_library)
_library.impl("sparse_linear_into", sparse_linear_cpu, "CPU")
_library.impl("sparse_linear_into", sparse_linear_cuda, "CUDA")
torch.library.register_fake("rtlynx::sparse_linear_into", _nothing, lib=_library)
_library.impl("norm_rotary_into", norm_rotary_cpu, "CPU")
_library.impl("norm_rotary_into", norm_rotary_cuda, "CUDA")
torch.library.register_fake("rtlynx::norm_rotary_into", _nothing, lib=_library)
