"""What the sparse layers of a model cost in one step, measured on its own inputs: the figure that methods are compared at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx.adaln_shift import shift_in_input
from rtlynx.calibrate.collect import LayerInput
from rtlynx.fp8 import dequantized_weight
from rtlynx.linear import SparseLinear
from rtlynx.timing import time_interleaved

TIMING = (
    "medians of CUDA-event times in ms, cold L2, sampled tokens of the layers' own inputs, "
    "those of a row interleaved with each other and with the dense layers"
)
"""What result files say of it."""


@torch.no_grad()
def layers_ms(inputs: Iterable[LayerInput], tokens: int, samples: int = 1, repeats: int = 10) -> tuple[float, float] | None:
    """Milliseconds of all layers together, as they are now and dense, each input with as many tokens as its share of ``tokens``.

    The dense products take turns with the layers as they are, so that the clock is the same for both: of two rows, which follow each
    other, it is not. Inputs whose layers are all dense are timed once, for both.

    Layers that read one input are timed one after the other on the same tensor, as the model calls them: what they share counts once. So
    do the passes around those that select without the shift of adaLN.

    Args:
        inputs: The layers and samples of what they read, or of what they select from, on the GPU.
        tokens: Rows of the most frequent input in one step; others get theirs in proportion to how many tokens they saw.
        samples: How many samples these rows are of: each has a shift of adaLN of its own.
        repeats: Timed calls.

    Returns:
        As they are, and dense; None without a GPU.
    """
    inputs = list(inputs)
    if inputs[0].samples.x.device.type != "cuda":
        return None
    most = max(input.seen for input in inputs)
    functions: dict[str, Callable[[], None]] = {}
    for input in inputs:
        call, dense = layer_calls(input, max(1, round(tokens * input.seen / most)), samples)
        functions[input.name] = call
        if dense is not None:
            functions[_dense(input)] = dense
    times = time_interleaved(functions, repeats, warm_up=2)
    now = [times[input.name] for input in inputs]
    return sum(now), sum(times.get(_dense(input), ms) for input, ms in zip(inputs, now, strict=True))


def layer_calls(input: LayerInput, rows: int, samples: int) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """Calls every layer of an input, on so many rows of its own: as they are, and dense; None for that where they are dense already.

    Where the layers select without the shift of adaLN, they are called as their block does: with ``(samples, tokens, K)`` that a shift
    ``(samples, K)`` is part of, and ``rows`` is rounded to whole tokens. Dense products know of no shift.
    """
    layers, kept = list(input.layers.values()), input.samples.x
    shifted = any(layer.shift_reader is not None for layer in layers)
    if shifted:
        rows = samples * max(1, round(rows / samples))
    x = kept.repeat(-(-rows // len(kept)), 1)[:rows].contiguous()
    if not shifted:
        return lambda: _call(layers, x), _dense_call(layers, x)
    left = x.unflatten(0, (samples, -1))
    shift = left[:, 0].clone()  # any vector costs what the modulation's would
    whole = left + shift.unsqueeze(1)

    def call() -> None:
        with shift_in_input(layers, shift):  # in every call, since x - shift is not made twice within it
            _call(layers, whole)

    return call, _dense_call(layers, whole)


def _call(layers: Iterable[SparseLinear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _dense_call(layers: Sequence[SparseLinear], x: Tensor) -> Callable[[], None] | None:
    """Plain products with the layers' weights; a compact layer's is made anew, once. None where the layers do no more than that."""
    rows = x.shape[:-1].numel()
    if all(layer.is_dense_now(rows, x.device) and layer.compact_scale is None for layer in layers):
        return None
    weights = [
        layer.weight if layer.compact_scale is None else dequantized_weight(layer.weight, layer.compact_scale, x.dtype) for layer in layers
    ]

    def call() -> None:
        for layer, weight in zip(layers, weights, strict=True):
            F.linear(x, weight, layer.bias)

    return call


def _dense(input: LayerInput) -> str:
    return f"{input.name}, dense"
