"""What inductor makes of the ops: layers that read one tensor select from it once, and a call is a launch and no more.

Every layer of a block calls ``rtlynx::sparsify``. In a graph with gradients torch's partitioner merges equal calls; an inference graph
reaches inductor as it was traced. So inductor is taught to lower equal calls of one graph to one. Graphs are functional by then: equal
arguments are equal values, whatever was written to in between.

A call is lowered to the op of `rtlynx.into` that writes to memory which inductor allocates: past autograd, without checks that the trace
made, and without a tensor of each output for Python. In the code that inductor writes it is the function behind the op, past torch's
dispatcher as well, which takes longer than all that the function does. A model of many small layers has to wait for the host.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rtlynx import into
from rtlynx.activations import selection_does

logger = logging.getLogger("rtlynx")

_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsqueeze.default,
}
_REPEATED = {torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor}
"""What a layer may compute before it selects."""

Lowering = Callable[..., Any]


def teach() -> None:
    """Called while an op is traced: by then inductor is loaded if it is what the trace is for. Importing it takes seconds."""
    if "torch._inductor.lowering" in sys.modules:
        _teach()


def teach_norm_rotary() -> None:
    """The same for `rtlynx.norm_rotary`, whose op there is once that is imported."""
    if "torch._inductor.lowering" in sys.modules:
        _teach_norm_rotary()


@functools.cache
def _teach_norm_rotary() -> None:
    from torch._inductor.lowering import lowerings, make_fallback

    op = torch.ops.rtlynx.norm_rotary.default
    make_fallback(op, warn=False)
    lowerings[op] = _either(_norm_rotary_into, lowerings[op])


@functools.cache
def _teach() -> None:
    from torch._inductor.lowering import lowerings, make_fallback
    from torch._inductor.virtualized import V

    sparsify, sparse_linear = torch.ops.rtlynx.sparsify.default, torch.ops.rtlynx.sparse_linear.default
    for op in (sparsify, sparse_linear):
        make_fallback(op, warn=False)  # what inductor does by itself with an op it meets
    select = _either(_sparsify_into, lowerings[sparsify])
    lowered: weakref.WeakKeyDictionary[Any, dict[object, Any]] = weakref.WeakKeyDictionary()

    def select_once(*args: Any) -> Any:
        mine = lowered.setdefault(V.graph, {})
        call = V.graph.current_node
        key = _value(call.args), call.meta.get("custom", {}).get("stream")
        if key not in mine:
            mine[key] = select(*args)
        return mine[key]

    lowerings[sparsify] = select_once
    lowerings[sparse_linear] = _either(_sparse_linear_into, lowerings[sparse_linear])


def _either(into: Lowering, otherwise: Lowering) -> Lowering:
    """The lowering ``into``, or ``otherwise`` where it gives None."""

    def lower(*args: Any) -> Any:
        result = into(*args)
        return otherwise(*args) if result is None else result

    return lower


def _sparsify_into(
    x: Any,
    score: Any,
    shift: Any,
    comp_down: Any,
    branch_input: str,
    norm_compensation: bool,
    eps: float,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
    activation: Any = "none",
    gate: Any = None,
    head: Any = None,
    norm_stats: Any = None,
    norm_weight: Any = None,
    norm_bias: Any = None,
    places: Any = None,
) -> Any:
    device = x.get_device()
    if not _can_write_into(1, 2, 3, 12) or not selection_does(device, activation) or (activation == "none" and head is not None):
        return None
    outputs = values, metadata, row_scale, branch = _outputs()
    inputs = x, gate, head, score, shift, comp_down
    written = values, metadata, row_scale if norm_compensation else None, None if comp_down is None else branch
    options = branch_input == "dropped", eps, values_scale, activation, norm_stats, norm_weight, norm_bias, places
    _call(torch.ops.rtlynx.sparsify_into.default, *inputs, *written, *options)
    return outputs


def _sparse_linear_into(
    values: Any,
    metadata: Any,
    weight: Any,
    row_scale: Any,
    branch: Any,
    comp_up: Any,
    bias: Any,
    weight_scale: Any = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    residual: Any = None,
    gate: Any = None,
) -> Any:
    if not _can_write_into(*range(8), 10, 11):
        return None
    (out,) = _outputs()
    product = values, metadata, weight, row_scale, branch, comp_up, bias, weight_scale, out
    after = () if activation == "none" and residual is None else (activation, *map(_in_order, (residual, gate)))
    _call(torch.ops.rtlynx.sparse_linear_into.default, *product, *after)
    return out


def _norm_rotary_into(*inputs: Any) -> Any:
    if not _can_write_into():
        return None
    (out,) = _outputs()
    _call(torch.ops.rtlynx.norm_rotary_into.default, *inputs, out)
    return out


def _in_order(x: Any) -> Any:
    """A tensor that inductor may still lay out as it likes, contiguous as it was traced."""
    from torch._inductor.ir import ExternKernel

    return None if x is None else ExternKernel.require_contiguous(x)


def _can_write_into(*contiguous: int) -> bool:
    """Whether inductor writes Python for this graph, and the arguments at these places of the present call are contiguous."""
    from torch._inductor.virtualized import V

    arguments = [V.graph.current_node.args[i] for i in contiguous if i < len(V.graph.current_node.args)]
    return not V.graph.cpp_wrapper and all(argument.meta["val"].is_contiguous() for argument in arguments if isinstance(argument, fx.Node))


def _outputs() -> tuple[Any, ...]:
    """Memory for what the present call returns."""
    from torch._inductor.lowering import lowerings
    from torch._inductor.utils import convert_shape_to_inductor
    from torch._inductor.virtualized import V

    of_call = V.graph.current_node.meta["val"]
    empty = lowerings[torch.ops.aten.empty_strided.default]
    return tuple(
        empty(*map(convert_shape_to_inductor, (tensor.shape, tensor.stride())), dtype=tensor.dtype, device=tensor.device)
        for tensor in ((of_call,) if isinstance(of_call, Tensor) else of_call)
    )


def _call(op: torch._ops.OpOverload, *arguments: Any) -> None:
    _direct_kernel().create(op, *arguments)


@functools.cache
def _direct_kernel() -> Any:
    """The class of a call that goes past the dispatcher, made when inductor is there."""
    from torch._inductor.ir import FallbackKernel

    class DirectKernel(FallbackKernel):
        """A call of the op, whose schema says what is written to, that is written down as a call of the function behind it."""

        def codegen(self, wrapper: Any) -> None:
            op: Any = self.op_overload
            device = self.get_device()
            function = None if device is None else into.FUNCTIONS.get((op, device.type))
            if function is not None:
                # By names that torch does not promise. Where they are others, the op is called.
                with contextlib.suppress(AttributeError, TypeError):
                    # A line of the code, not an import here: where inductor takes code from its cache, this does not run.
                    wrapper.add_import_once("from rtlynx import into as rtlynx_into")
                    self.python_kernel_name = f"rtlynx_into.{function}"
            super().codegen(wrapper)

    return DirectKernel


def _value(x: object) -> object:
    """Equal for two arguments that are the same value: what leads to them may have been traced once for every layer."""
    if isinstance(x, (tuple, list)):
        return tuple(map(_value, x))
    if not isinstance(x, fx.Node):
        return x
    if x.target in _VIEWS:
        # A view keeps the elements in their order, so its shape says all. As text: each trace may have computed a symbolic one anew.
        shape = str(tuple(x.meta["val"].shape))
        source: object = x
        while isinstance(source, fx.Node) and source.target in _VIEWS:
            source = source.args[0]
        return _value(source), shape
    if x.target in _REPEATED:
        return x.target, _value(x.args)
    return x
