"""`Trajectory`: what the dense model saw and answered on its own way from noise to picture, to be asked again of a sparse one.

Compared there, the error is the model's alone: it does not grow because an earlier step went elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Trajectory:
    """Calls of a model, recorded while it runs.

    Attributes:
        calls: The call's number in its run, its keyword arguments, and the answer.
    """

    calls: list[tuple[int, dict[str, Any], Tensor]] = field(default_factory=list)
    _number: int = 0
    _copies: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    @contextmanager
    def recording(self, model: nn.Module, wanted: Callable[[int], bool] = lambda call: True, per_run: int | None = None) -> Iterator[None]:
        """Record while the model runs inside the block.

        Arguments by position, with which some pipelines call, are recorded by their names.

        Args:
            model: The dense one.
            wanted: Which calls of a run, from 0 on, to record.
            per_run: Calls of one run, after which the next one begins; None: `begin_run` says when.
        """

        def record(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
            if self._number == per_run:
                self.begin_run()
            if wanted(self._number):
                named = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **inputs}
                copied = {key: self._copy(value) for key, value in named.items()}
                self.calls.append((self._number, copied, prediction(output).clone()))
            self._number += 1

        handle = model.register_forward_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.begin_run()

    def begin_run(self) -> None:
        """The next batch of prompts counts its calls anew."""
        self._number = 0
        self._copies.clear()

    def _copy(self, value: Any) -> Any:
        """A copy, since a scheduler may write to its latents; what does not change from step to step is copied once."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._copy, value))
        if not isinstance(value, Tensor):
            return value
        version = 0 if value.is_inference() else value._version
        known = self._copies.get(id(value))
        if known is None or known[0] is not value or known[1] != version:
            known = self._copies[id(value)] = (value, version, value.clone())
        return known[2]

    @property
    def steps(self) -> list[int]:
        """The recorded steps, in order."""
        return sorted({step for step, _, _ in self.calls})

    @torch.no_grad()
    def errors(
        self,
        model: nn.Module,
        adapt: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
        batches: Sequence[int] | None = None,
        pictures: int = 1,
    ) -> VelocityErrors:
        """How far ``model`` is from the recorded answers.

        Args:
            model: With the interface of the recorded one.
            adapt: Makes its keyword arguments from a step and the recorded ones, e.g. for a model of another dtype.
            batches: Prompts of every run, which the samples then are: a call with guidance has rows of its batch several times over, one
                copy after the other, and not every call need have. None: rows are the samples, as many in every call of a run.
            pictures: Of a prompt, next to each other.
        """
        squared: dict[int, list[Tensor]] = {}
        size: dict[int, list[Tensor]] = {}
        run, last = -1, -1
        for step, inputs, dense in self.calls:
            run, last = run + (step <= last or run < 0), step
            answer = prediction(model(**(inputs if adapt is None else adapt(step, inputs)))).double()
            for found, values in ((squared, answer - dense), (size, dense.double())):
                rows = values.square().flatten(1).sum(1).cpu()
                found.setdefault(step, []).append(rows if batches is None else rows.unflatten(0, (-1, batches[run], pictures)).sum((0, 2)))
        return VelocityErrors(self.steps, *(torch.stack([torch.cat(parts[step]) for step in self.steps]) for parts in (squared, size)))


@dataclass(frozen=True)
class VelocityErrors:
    """Squared errors of predictions, and their squared sizes.

    Attributes:
        steps: The S steps compared.
        squared: ``(S, n)`` float64: ‖v - v_dense‖² by step and sample.
        size: ``(S, n)``: ‖v_dense‖².
    """

    steps: list[int]
    squared: Tensor
    size: Tensor

    def relative(self, samples: Tensor | None = None) -> float:
        """``‖v - v_dense‖ / ‖v_dense‖`` over all steps and samples, or over some (with repeats) of them."""
        squared, size = (t if samples is None else t[:, samples] for t in (self.squared, self.size))
        return float((squared.sum() / size.sum()).sqrt())

    def by_step(self) -> list[float]:
        """The same for every step."""
        return (self.squared.sum(1) / self.size.sum(1)).sqrt().tolist()


def prediction(output: Any) -> Tensor:
    """A model's answer as one tensor with a leading sample dimension, whichever way it returns it."""
    value = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    return torch.stack(list(value)) if isinstance(value, (tuple, list)) else value
