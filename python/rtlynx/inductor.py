"""Compiled, layers that read one tensor select from it once.

Every layer of a block calls ``rtlynx::sparsify``. In a graph with gradients torch's partitioner merges equal calls; an inference graph
reaches inductor as it was traced. So inductor is taught to lower equal calls of one graph to one. Graphs are functional by then: equal
arguments are equal values, whatever was written to in between.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

logger = logging.getLogger("rtlynx")

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}
_REPEATED = {torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor}
"""What a layer may compute before it selects."""


def share_selections() -> None:
    """Called while the op is traced: by then inductor is loaded if it is what the trace is for. Importing it takes seconds."""
    if "torch._inductor.lowering" in sys.modules:
        _teach()


@functools.cache
def _teach() -> None:
    from torch._inductor.lowering import lowerings, make_fallback
    from torch._inductor.virtualized import V

    op = torch.ops.rtlynx.sparsify.default
    make_fallback(op, warn=False)  # what inductor does by itself with an op it meets
    lower: Callable[..., Any] = lowerings[op]
    lowered: weakref.WeakKeyDictionary[Any, dict[object, Any]] = weakref.WeakKeyDictionary()

    def lower_once(*args: Any) -> Any:
        mine = lowered.setdefault(V.graph, {})
        call = V.graph.current_node
        key = _value(call.args), call.meta.get("custom", {}).get("stream")
        if key not in mine:
            mine[key] = lower(*args)
        return mine[key]

    lowerings[op] = lower_once


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
