"""Fit the layers that read one input: choose the selection once, then solve for every layer's compensation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtlynx.bias_groups import group_of
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.factor import padded
from rtlynx.calibrate.methods import METHODS
from rtlynx.calibrate.moments import Moments
from rtlynx.calibrate.problem import Method, Problem, fitted_bias
from rtlynx.calibrate.selection import OPTIONS, Selection, choose
from rtlynx.config import rank_of
from rtlynx.eligibility import own_name
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import values_scale_for
from rtlynx.linear import SparseLinear

logger = logging.getLogger("rtlynx")

RIDGE = 1e-2
"""λ relative to the mean diagonal of the second moment that is inverted."""
FEW_TOKENS_RIDGE = 1e-1
"""The same when it was measured on so few tokens that its small directions are noise."""
TOKENS_PER_CHANNEL = 2
"""Below this many sampled tokens per channel that is so."""
MOST_GROUPS = 64
"""Of timesteps with a bias of their own: more than most pipelines take steps are a mistake."""
_TOKENS_FOR_SIZE = 512

Cache = dict[tuple[object, ...], Moments]
Tensors = dict[str, Tensor]
"""Keyword arguments of `SparseLinear.set_compensation`."""


@dataclass(frozen=True)
class Fit:
    """What to fit.

    Attributes:
        method: One of `METHODS`.
        rank: Of the branch, for methods that have one; padded with zeros to a multiple of 16.
        selection: Some of `OPTIONS`.
        bias: In how many groups of timesteps the mean of what is still missing is restored by a bias: True is 1, False none.
        share: Whether layers that select from one input together get one branch, so that they still can.
        norm_compensation: Whether kept channels are rescaled to the token's norm.
        seed: For methods that draw random numbers.
        training_steps, learning_rate: For methods that train.
        ranks: Pairs of a glob and the rank of the layers it names, instead of `rank`.

    Raises:
        InvalidArgumentError: An unknown method or option, or no number of groups.
    """

    method: str = "split"
    rank: int = 64
    selection: tuple[str, ...] = ()
    bias: bool | int = False
    share: bool = True
    norm_compensation: bool = True
    seed: int = 0
    training_steps: int = 2000
    learning_rate: float = 5e-3
    ranks: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidArgumentError("calibrate", "method", repr(self.method), f"one of {', '.join(map(repr, METHODS))}")
        unknown = sorted(set(self.selection) - set(OPTIONS))
        if unknown:
            raise InvalidArgumentError("calibrate", "selection", ", ".join(map(repr, unknown)), f"some of {', '.join(map(repr, OPTIONS))}")

        if not isinstance(self.bias, int) or not 0 <= self.bias <= MOST_GROUPS:
            expected = f"a boolean, or a number of groups up to {MOST_GROUPS}"
            raise InvalidArgumentError("calibrate", "bias", repr(self.bias), expected)

    @property
    def rule(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    def rank_of(self, layer: str) -> int:
        """Rank of the layer's branch; 0 for methods without one."""
        return 0 if self.rule.branch == "none" else rank_of(own_name(layer), self.ranks, self.rank)


def too_few(input: LayerInput) -> bool:
    """Whether there are so few samples of it that a stronger ridge is used."""
    return len(input.samples) < TOKENS_PER_CHANNEL * input.samples.x.shape[1]


def warn_of_few(op: str, layers: Sequence[str]) -> None:
    """Log that the inputs of these layers had `too_few` samples, if there are any."""
    if layers:
        message = "%s: %d layers saw fewer than %d tokens per channel, first %s: use more prompts"
        logger.warning(message, op, len(layers), TOKENS_PER_CHANNEL, layers[0])


@torch.no_grad()
def fit_input(input: LayerInput, fit: Fit, device: torch.device, cache: Cache | None = None) -> Iterator[tuple[str, Tensors]]:
    """Compensation of every layer that reads ``input``, by name; tensors are on the CPU, as the layer will hold them.

    Args:
        input: Samples and layers.
        fit: What to fit.
        device: Where to solve.
        cache: Keeps moments for another fit of the same input with the same selection; the caller clears it when that changes.
    """
    cache = {} if cache is None else cache
    x = input.samples.x
    ridge = FEW_TOKENS_RIDGE if too_few(input) else RIDGE
    for layers in _ranked_alike(input.layers):
        scaled = {name: _Scaled.of(layer, x, device) for name, layer in layers.items()}
        key = (*layers, fit.selection, fit.norm_compensation, fit.bias)
        if key not in cache:
            plain = Selection(score=_score(next(iter(layers.values())), device), norm_compensation=fit.norm_compensation)
            selection = choose(fit.selection, x, [part.weight for part in scaled.values()], plain, device)
            cache[key] = Moments(x, selection, bool(fit.bias), device, _groups(input, fit), max(1, int(fit.bias)))
        moments = cache[key]
        scale = values_scale_for(_peak(x, moments.selection))
        for stack in _stacks(layers, fit):
            for name, tensors in _fit_stack({name: scaled[name] for name in stack}, moments, fit, ridge):
                yield name, tensors if scale == 1 else tensors | {"values_scale": torch.tensor([scale])}


def _peak(x: Tensor, selection: Selection) -> float:
    """The largest magnitude that selection sees in the samples: what fp8 has to hold."""
    ends = selection.gather(torch.stack([x.amin(0), x.amax(0)])).float()
    return float((ends if selection.shift is None else ends - selection.shift.to(ends.device)).abs().max())


def _groups(input: LayerInput, fit: Fit) -> Tensor | None:
    """For every sampled token the group of timesteps it was read in; None where one bias serves all."""
    if fit.bias <= 1:
        return None
    level = input.samples.level
    if level is None or level.isnan().any():
        got, expected = f"{fit.bias} groups of timesteps", "1, or runs that call the model, which is told the time"
        raise InvalidArgumentError("calibrate", "bias", f"{got}, and {input.name} called outside of the model", expected)
    return group_of(level, fit.bias)


@dataclass(frozen=True)
class _Scaled:
    """A layer's weight divided by the size of its output, so that layers solved together count by their relative errors."""

    weight: Tensor
    size: float
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: SparseLinear, x: Tensor, device: torch.device) -> _Scaled:
        weight = layer.weight.detach().to(device, torch.float32)
        some = x[:: max(1, len(x) // _TOKENS_FOR_SIZE)].to(device, torch.float32)
        size = max(float((some @ weight.T).square().mean().sqrt()), torch.finfo(torch.float32).tiny)
        return cls(weight / size, size, layer.weight.dtype)


def _fit_stack(stack: dict[str, _Scaled], moments: Moments, fit: Fit, ridge: float) -> Iterator[tuple[str, Tensors]]:
    """Solve layers as one with their outputs side by side, so that a branch has one `comp_down` for all of them."""
    selection, wanted = moments.selection, fit.rank_of(next(iter(stack)))
    rule = fit.rule if wanted else METHODS["refit" if fit.rule.own_weight else "plain"]
    sizes = [len(part.weight) for part in stack.values()]
    rank = min(wanted, moments.x.shape[1], sum(sizes))  # more has nothing to do
    weight = selection.gather(torch.cat([part.weight for part in stack.values()]))
    problem = Problem(moments, weight, rank, ridge, fit.seed, fit.training_steps, fit.learning_rate)
    solution = rule.solve(problem)
    bias = None
    if fit.bias or selection.shift is not None:
        bias = torch.zeros(moments.groups, sum(sizes), dtype=torch.float64, device=moments.device)
        bias += 0 if selection.shift is None else selection.shift.double() @ problem.wt
        bias += fitted_bias(problem, solution, rule.branch) if fit.bias else 0
    own = None if solution.weight_change is None else (problem.wt + solution.weight_change).T
    vectors = {"shift": selection.shift, "permutation": selection.permutation}
    rows = torch.arange(sum(sizes), device=moments.device).split(sizes)
    for (name, part), mine in zip(stack.items(), rows, strict=True):
        found = {
            "comp_down": None if solution.branch is None else padded(solution.branch.down),
            "comp_up": None if solution.branch is None else padded(solution.branch.up[mine] * part.size),
            "comp_bias": None if bias is None else bias[:, mine].squeeze(0) * part.size,
            "sparse_weight": None if own is None else own[mine] * part.size,
        }
        stored = {key: value.to("cpu", part.dtype).contiguous() for key, value in found.items() if value is not None}
        yield name, {**stored, **{key: value.cpu() for key, value in vectors.items() if value is not None}}


def _score(layer: SparseLinear, device: torch.device) -> Tensor | None:
    """The layer's score in the order of its input, whatever permutation it has now."""
    if layer.score is None or layer.permutation is None:
        return None if layer.score is None else layer.score.to(device)
    return torch.empty_like(layer.score).scatter_(0, layer.permutation, layer.score).to(device)


def _ranked_alike(layers: dict[str, SparseLinear]) -> Iterator[dict[str, SparseLinear]]:
    """Layers that rank channels by the same score, and so can share one selection."""
    left = dict(layers)
    while left:
        first = next(iter(left.values())).score
        alike = {n: layer for n, layer in left.items() if (layer.score is first or _equal(layer.score, first))}
        left = {name: layer for name, layer in left.items() if name not in alike}
        yield alike


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _stacks(layers: dict[str, SparseLinear], fit: Fit) -> list[list[str]]:
    """Names of the layers that are solved as one: those that select together at inference, where branches of one rank must agree."""
    stacks: list[list[str]] = []
    for name, layer in layers.items():
        group, rank = layer.input_group if fit.share else None, fit.rank_of(name)
        alike = (s for s in stacks if group is not None and layers[s[0]].input_group is group and fit.rank_of(s[0]) == rank)
        twin = next(alike, None)
        if twin is None:
            stacks.append([name])
        else:
            twin.append(name)
    return stacks
