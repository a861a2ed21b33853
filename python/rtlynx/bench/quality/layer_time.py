"""What the sparse layers of a model cost in one step, measured on its own inputs: the figure that methods are compared at."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rtlynx.calibrate.collect import LayerInput
from rtlynx.timing import time_interleaved

TIMING = "medians of CUDA-event times in ms, cold L2, sampled tokens of the layers' own inputs, those of a row interleaved"
"""What result files say of it."""


@torch.no_grad()
def layers_ms(inputs: Iterable[LayerInput], tokens: int, repeats: int = 10) -> float | None:
    """Milliseconds of all layers together, as they are now, each input with as many tokens as its share of ``tokens``; None without a GPU.

    Layers that read one input are timed one after the other on the same tensor, as the model calls them: what they share counts once.

    Args:
        inputs: The layers and samples of what they read, on the GPU.
        tokens: Rows of the most frequent input in one step; others get theirs in proportion to how many tokens they saw.
        repeats: Timed calls.
    """
    inputs = list(inputs)
    if inputs[0].samples.x.device.type != "cuda":
        return None
    most = max(input.seen for input in inputs)
    functions = {input.name: _calls(input, max(1, round(tokens * input.seen / most))) for input in inputs}
    return sum(time_interleaved(functions, repeats, warm_up=2).values())


def _calls(input: LayerInput, rows: int) -> Callable[[], None]:
    samples = input.samples.x

    def run() -> None:
        for layer in input.layers.values():
            layer(x)

    x: Tensor = samples.repeat(-(-rows // len(samples)), 1)[:rows].contiguous()
    return run
