"""What every option does to the model's output, to first order, from one backward pass per call.

Let v be the output, Y a layer's dense output and δY what an option changes in it. For a random probe u with independent unit-variance
entries, E⟨u, (∂v/∂Y) δY⟩² = ‖(∂v/∂Y) δY‖²: the squared error that reaches the output. The inner product is ⟨∂(u·v)/∂Y, δY⟩, and one
backward pass gives ∂(u·v)/∂Y of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtlynx.errors import InvalidArgumentError
from rtlynx.evaluate.trajectory import Trajectory, prediction
from rtlynx.linear import SparseLinear
from rtlynx.search.options import Option, Unit


class Effects:
    """Inner products of probes with what options change.

    Attributes:
        products: ``(S, units, options)`` float64, one row for every sample of every call and probe, relative to the output's size: the
            mean square over S of a sum of entries, one per unit, is the squared relative error that those options cause together.
        rows: Tokens that every unit saw in a call, the most of any call.
    """

    def __init__(self, units: Sequence[Unit], options: Sequence[Option]) -> None:
        self.units, self.options = units, options
        self.products = torch.zeros(0, len(units), len(options), dtype=torch.float64)
        self.rows = [0] * len(units)

    @property
    def single(self) -> Tensor:
        """``(units, options)``: squared relative error of every option on its own."""
        return self.products.square().mean(0)

    def measure(self, model: nn.Module, trajectory: Trajectory, probes: int, seed: int) -> Iterator[None]:
        """Probe every recorded call of the dense model; yields after each.

        Args:
            model: With all units dense.
            trajectory: Its recorded calls.
            probes: Probes per call.
            seed: Of the probes.

        Raises:
            InvalidArgumentError: Outputs or gradients are not finite, or all outputs are 0.
        """
        generator = torch.Generator().manual_seed(seed)
        size = sum(float(dense.double().square().sum()) for _, _, dense in trajectory.calls)
        samples = sum(dense.shape[0] for _, _, dense in trajectory.calls)
        if not 0 < size < math.inf:
            raise InvalidArgumentError(
                "search", "pipe_or_module", f"outputs whose squares sum to {size}", "a model with finite ones, not all 0"
            )
        scale = (samples / size) ** 0.5
        found = []
        for _, inputs, dense in trajectory.calls:
            for _ in range(probes):
                u = torch.randn(dense.shape, generator=generator)
                found.append(self._probe(model, inputs, u) * scale)
                yield
        self.products = torch.cat(found)

    def _probe(self, model: nn.Module, inputs: dict[str, Any], u: Tensor) -> Tensor:
        """``(samples, units, options)`` of one call."""
        found = torch.zeros(len(u), len(self.units), len(self.options), dtype=torch.float64)
        with _without_weight_gradients(model), torch.enable_grad():
            handles = [
                layer.register_forward_hook(lambda module, args, output, i=i, name=name: self._watch(i, name, args[0], output, found))
                for i, unit in enumerate(self.units)
                for name, layer in unit.layers.items()
            ]
            try:
                with _without_cudnn_attention():
                    v = prediction(model(**inputs))
                    (v.float() * u.to(v.device)).sum().backward()
            finally:
                for handle in handles:
                    handle.remove()
        if not found.isfinite().all():
            raise InvalidArgumentError("search", "pipe_or_module", "gradients or outputs that are not finite", "a model with finite ones")
        return found

    def _watch(self, i: int, name: str, x: Tensor, output: Tensor, found: Tensor) -> None:
        x = x.detach()
        self.rows[i] = max(self.rows[i], x.shape[:-1].numel())
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: self._take(i, name, x, gradient, found))

    @torch.no_grad()
    def _take(self, i: int, name: str, x: Tensor, gradient: Tensor, found: Tensor) -> None:
        unit = self.units[i]
        layer: SparseLinear = unit.layers[name]
        dense, gradient = F.linear(x, layer.weight, layer.bias).float(), gradient.float()
        for o, option in enumerate(self.options):
            if option is None:
                continue
            layer.set_compensation(**unit.fitted[option][name])
            layer.dense = False
            product = gradient * (layer(x).float() - dense)
            if len(product) == len(found):  # samples come first
                found[:, i, o] += product.flatten(1).sum(1, dtype=torch.float64).cpu()
            else:  # samples are independent probes, so the square of their sum has the same mean
                found[0, i, o] += product.sum(dtype=torch.float64).cpu()
        layer.dense = True
        layer.set_compensation()


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Inside the block torch takes another of its fused attentions.

    The gradients of cuDNN's are not finite for some lengths (pytorch#196678), and probes ended in illegal memory accesses with it.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient: only those of outputs are wanted."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
