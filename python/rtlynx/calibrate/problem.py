"""What a method is given and what it answers: the interface of everything in `rtlynx.calibrate.methods`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rtlynx.calibrate.factor import Branch
from rtlynx.calibrate.moments import Moments
from rtlynx.calibrate.selection.vectors import Piece
from rtlynx.config import Branch as BranchInput

READS: dict[BranchInput, Piece] = {"input": "whole", "dropped": "dropped"}
"""What a branch reads → what the moments call it."""


@dataclass(frozen=True)
class Problem:
    """One layer to be compensated.

    Over the sampled tokens ``moments`` knows the pieces of the input; the layer should give ``whole · Wᵀ``, its sparse product gives
    ``kept · Wᵀ``, and so ``missed · Wᵀ`` is what compensation is for.

    Attributes:
        moments: Of the input, with channels in the order selection reads them.
        weight: ``(N, K)``, its columns in the same order.
        rank: Of the branch; 0 for none.
        ridge: Relative to the mean diagonal of whatever second moment is inverted.
        seed: For methods that draw random numbers.
        training_steps, learning_rate: For methods that train.
    """

    moments: Moments
    weight: Tensor
    rank: int
    ridge: float
    seed: int = 0
    training_steps: int = 2000
    learning_rate: float = 5e-3

    @cached_property
    def wt(self) -> Tensor:
        """Wᵀ, ``(K, N)`` float64, where the moments are."""
        return self.weight.detach().to(self.moments.device, torch.float64).T

    def best_branch(self, reads: BranchInput) -> Branch:
        """The C of this rank that minimises ``mean ‖missed·Wᵀ - Z C‖²``, Z being what the branch reads: reduced-rank regression."""
        piece = READS[reads]
        target = self.moments.product(piece, "missed").double() @ self.wt
        return self.moments.factor(piece, self.ridge).branch(target, self.rank)


@dataclass(frozen=True)
class Solution:
    """What a method found; every part may be absent.

    Attributes:
        branch: The low-rank branch on what the method's `branch` says.
        weight_change: ``ΔWᵀ``, ``(K, N)`` float64: the sparse product uses W + ΔW.
    """

    branch: Branch | None = None
    weight_change: Tensor | None = None


class Method(Protocol):
    """A way to find a layer's compensation.

    Attributes:
        name: What `rtlynx.calibrate` and the command line call it.
        about: One line for people.
        branch: What its branch reads.
        own_weight: Whether the sparse product gets a weight of its own (the *full* tier).
    """

    name: str
    about: str
    branch: BranchInput
    own_weight: bool

    def solve(self, problem: Problem) -> Solution:
        """Fit one layer."""
        ...


def fitted_bias(problem: Problem, solution: Solution, method_branch: BranchInput) -> Tensor:
    """``(groups, N)`` float64: the means of what is still missing, which a bias restores at no cost. The moments must be centred."""
    moments = problem.moments
    bias = moments.mean("missed") @ problem.wt
    if solution.weight_change is not None:
        bias = bias - moments.mean("kept") @ solution.weight_change
    if solution.branch is not None:
        read = moments.mean(READS[method_branch])
        bias = bias - (read @ solution.branch.down) @ solution.branch.up.T
    return bias


def half(solution: Tensor, like: Tensor) -> Tensor:
    """A float64 solution in the dtype and on the device of a layer's weight."""
    return solution.to(torch.float32).to(like.device, like.dtype)
