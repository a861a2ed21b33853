"""What the sparse layers of a model cost in one step, measured on its own inputs: the figure that methods are compared at."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rtlynx.adaln_shift import shift_in_input
from rtlynx.calibrate.collect import LayerInput
from rtlynx.linear import SparseLinear
from rtlynx.timing import time_interleaved

TIMING = "medians of CUDA-event times in ms, cold L2, sampled tokens of the layers' own inputs, those of a row interleaved"
"""What result files say of it."""


@torch.no_grad()
def layers_ms(inputs: Iterable[LayerInput], tokens: int, samples: int = 1, repeats: int = 10) -> float | None:
    """Milliseconds of all layers together, as they are now, each input with as many tokens as its share of ``tokens``; None without a GPU.

    Layers that read one input are timed one after the other on the same tensor, as the model calls them: what they share counts once. So
    do the passes around those that select without the shift of adaLN.

    Args:
        inputs: The layers and samples of what they read, or of what they select from, on the GPU.
        tokens: Rows of the most frequent input in one step; others get theirs in proportion to how many tokens they saw.
        samples: How many samples these rows are of: each has a shift of adaLN of its own.
        repeats: Timed calls.
    """
    inputs = list(inputs)
    if inputs[0].samples.x.device.type != "cuda":
        return None
    most = max(input.seen for input in inputs)
    functions = {input.name: layer_calls(input, max(1, round(tokens * input.seen / most)), samples) for input in inputs}
    return sum(time_interleaved(functions, repeats, warm_up=2).values())


def layer_calls(input: LayerInput, rows: int, samples: int) -> Callable[[], None]:
    """Calls every layer of an input, on so many rows of its own.

    Where the layers select without the shift of adaLN, they are called as their block does: with ``(samples, tokens, K)`` that a shift
    ``(samples, K)`` is part of, and ``rows`` is rounded to whole tokens.
    """
    layers, kept = list(input.layers.values()), input.samples.x
    shifted = any(layer.shift_reader is not None for layer in layers)
    if shifted:
        rows = samples * max(1, round(rows / samples))
    x = kept.repeat(-(-rows // len(kept)), 1)[:rows].contiguous()
    if not shifted:
        return lambda: _call(layers, x)
    left = x.unflatten(0, (samples, -1))
    shift = left[:, 0].clone()  # any vector costs what the modulation's would
    whole = left + shift.unsqueeze(1)

    def call() -> None:
        with shift_in_input(layers, shift):  # in every call, since x - shift is not made twice within it
            _call(layers, whole)

    return call


def _call(layers: Iterable[SparseLinear], x: Tensor) -> None:
    for layer in layers:
        layer(x)
