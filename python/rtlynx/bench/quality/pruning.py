"""2:4 sparse *weights*, what the paper compares with: by magnitude, and Wanda (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from rtlynx.calibrate.collect import LayerInput
from rtlynx.linear import SparseLinear
from rtlynx.reference import keep_mask


@contextmanager
def pruned_weights(inputs: Iterable[LayerInput], by_activation: bool) -> Iterator[dict[SparseLinear, Tensor]]:
    """Inside the block, which gets them as they were, the layers' weights are 2:4 pruned in place; afterwards they are that, bit for bit.

    Args:
        inputs: The layers, with samples of what they read.
        by_activation: Rank weights by ``|w_ij|·‖x_j‖`` (Wanda) instead of ``|w_ij|``.
    """
    before: dict[SparseLinear, Tensor] = {}
    try:
        for input in inputs:
            norm = input.samples.x.float().square().sum(0).sqrt() if by_activation else None
            for layer in input.layers.values():
                weight = layer.weight.data
                before[layer] = weight.clone()
                weight.masked_fill_(~keep_mask(weight, None if norm is None else norm.to(weight.device)), 0)
        yield before
    finally:
        for layer, weight in before.items():
            layer.weight.data.copy_(weight)
        before.clear()
