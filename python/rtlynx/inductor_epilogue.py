"""What inductor makes of a block's ``residual + gate · layer(x)``: one call, in which the layer's product adds to the residual.

A block needs no change for it. In the graph that inductor is about to lower, M = B · S tokens of N channels::

    sparse_linear ─▶ view (B, S, N) ─▶ mul ─▶ add           becomes    sparse_linear(residual, gate) ─▶ view (B, S, N)
               gate (B or 1, 1, N) ────┘       │
               residual (B, S, N) ─────────────┘

All are of one dtype. inductor would compute mul and add in float32 and round once, as the product does.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx

logger = logging.getLogger("rtlynx")

_RESIDUAL = 10
"""Place of `residual` among the arguments of the op; the gate comes next."""
_DEFAULTS = (*[None] * 9, "none")
"""Of the arguments before it, as far as they have any."""


def find_epilogues() -> None:
    """Have inductor look for it in every graph from now on; with a torch whose inductor cannot be told to, it does not."""
    try:
        from torch._inductor.fx_passes.post_grad import pass_patterns
        from torch._inductor.pattern_matcher import CallFunction, CallFunctionVarArgs, Ignored, KeywordArg, register_graph_pattern
    except ImportError as error:
        logger.info("compiled blocks add to their residual in steps of their own: %s", error)
        return
    aten = torch.ops.aten
    views = [aten.view.default, aten.reshape.default, aten._unsafe_view.default]
    y = CallFunction(views, CallFunctionVarArgs(torch.ops.rtlynx.sparse_linear.default), Ignored())
    residual, gate = KeywordArg("residual"), KeywordArg("gate")
    for gated in (CallFunction(aten.mul.Tensor, gate, y), CallFunction(aten.mul.Tensor, y, gate)):
        for pattern in (CallFunction(aten.add.Tensor, residual, gated), CallFunction(aten.add.Tensor, gated, residual)):
            register_graph_pattern(pattern, extra_check=_fits, pass_dict=pass_patterns[0])(_fuse)


def _fits(match: Any) -> bool:
    """Whether the product can do it; what is not known of a symbolic size is no."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    def equal(shape: Any, other: Any) -> bool:
        return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))

    product, view, add = _chain(match)
    if product.kwargs or add.kwargs:  # a factor on what is added: not every torch's pattern minds it
        return False
    operands = [product, view, match.kwargs["residual"], match.kwargs["gate"]]
    if not all(isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) for node in operands):
        return False
    rows, y, residual, gate = (node.meta["val"] for node in operands)
    if any(tensor.dtype != rows.dtype or tensor.device != rows.device for tensor in (residual, gate)):
        return False
    if y.dim() != 3 or gate.dim() != 3 or not equal(residual.shape, y.shape) or not residual.is_contiguous():
        return False
    m, n = rows.shape
    samples = gate.shape[0]
    if not equal(gate.shape, (samples, 1, n)) or not statically_known_true(y.shape[2] == n):
        return False
    if not (statically_known_true(samples == 1) or statically_known_true(samples == y.shape[0])):
        return False
    return all(given is None for given in product.args[_RESIDUAL:]) and statically_known_true(m % samples == 0)


def _chain(match: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The nodes of product, view and sum."""
    add = match.output_node()
    (product,) = (node for node in match.nodes if node.target is torch.ops.rtlynx.sparse_linear.default)
    (view,) = product.users
    return product, view, add


def _fuse(match: Any, *_arguments: Any, residual: fx.Node, gate: fx.Node) -> None:
    from torch._inductor.virtualized import V

    product, view, add = _chain(match)
    n = product.meta["val"].shape[1]
    aten = torch.ops.aten

    def call(op: Any, *arguments: Any, **options: Any) -> fx.Node:
        node: fx.Node = match.graph.call_function(op, arguments, options)
        values = fx.map_arg((arguments, options), lambda argument: argument.meta["val"])
        with V.fake_mode:
            node.meta = {"val": op(*values[0], **values[1])}
        return node

    with match.graph.inserting_before(add):
        rows, gates = call(aten.reshape.default, residual, [-1, n]), call(aten.reshape.default, gate, [-1, n])
        if not gates.meta["val"].is_contiguous():
            gates = call(aten.clone.default, gates, memory_format=torch.contiguous_format)
        given = (*product.args, *_DEFAULTS[len(product.args) :])[:_RESIDUAL]
        fused = match.graph.call_function(product.target, (*given, rows, gates))
        fused.meta = dict(product.meta)
        out = match.graph.call_function(view.target, (fused, *view.args[1:]))
        out.meta = dict(add.meta)
    add.replace_all_uses_with(out)
    for node in reversed(match.nodes):
        match.graph.erase_node(node)
