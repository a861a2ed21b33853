"""`paper-trained`: RT-Lynx's branch as the paper makes it, a LoRA trained on the residual with AdamW; here for comparison.

The same problem as `paper`: ``mean ‖missed·Wᵀ - X' · down · upᵀ‖²``, the weight fixed. Input and residual are scaled to unit size, so that
one learning rate suits every layer; down starts random and up at zero, as a LoRA does; the rate falls to zero along a cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rtlynx.calibrate.factor import Branch
from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch as BranchInput

BATCH = 1024
_TINY = 1e-12


class _PaperTrained:
    name = "paper-trained"
    about = "the RT-Lynx paper's branch, trained with AdamW"
    branch: BranchInput = "input"
    own_weight = False

    def solve(self, problem: Problem) -> Solution:
        with torch.no_grad():
            return Solution(_train(*_regression(problem), problem))


def _regression(problem: Problem) -> tuple[Tensor, Tensor]:
    """What the branch reads and what it should give, ``(T, K)`` and ``(T, N)`` float32, centred if a bias is fitted too."""
    wt = problem.wt.float()
    parts = [(whole, missed @ wt) for whole, missed in problem.moments.deviations("whole", "missed")]
    return torch.cat([z for z, _ in parts]), torch.cat([target for _, target in parts])


def _train(z: Tensor, target: Tensor, problem: Problem) -> Branch:
    rank, steps, rate = problem.rank, problem.training_steps, problem.learning_rate
    generator = torch.Generator().manual_seed(problem.seed)
    z_size, target_size = (t.square().mean().sqrt().clamp_min(_TINY) for t in (z, target))
    down = (torch.randn(z.shape[1], rank, generator=generator) / math.sqrt(z.shape[1])).to(z.device)
    up = torch.zeros(target.shape[1], rank, device=z.device)
    optimiser = torch.optim.AdamW([down, up], lr=rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    order = torch.empty(0, dtype=torch.int64)
    batch = min(BATCH, len(z))
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(z), generator=generator).to(z.device)
        rows, order = order[:batch], order[batch:]
        x, y = z[rows] / z_size, target[rows] / target_size
        hidden = x @ down
        error = (hidden @ up.T - y) / batch
        # The two gradients by hand: autograd would spend most of such a small step on bookkeeping.
        up.grad, down.grad = error.T @ hidden, x.T @ (error @ up)
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.step()
    return Branch((down / z_size).double(), (up * target_size).double())


PAPER_TRAINED = _PaperTrained()
