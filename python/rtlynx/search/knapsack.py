"""One option for every unit: the least error within a budget of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rtlynx.errors import InvalidArgumentError


def solve(errors: Tensor, times: Tensor, budget: float) -> list[int]:
    """The options with the least sum of ``errors`` whose ``times`` sum to at most ``budget``: a multiple-choice knapsack.

    Args:
        errors: ``(units, options)``.
        times: ``(units, options)``.
        budget: In the unit of ``times``.

    Raises:
        InvalidArgumentError: Even the fastest options take longer.
        ImportError: SciPy is not installed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    fastest = float(times.min(1).values.sum())
    if fastest > budget * (1 + 1e-9):
        raise InvalidArgumentError("search", "budget", f"a time of {budget:.4g}", f"at least {fastest:.4g}, the fastest there is")
    units, options = errors.shape
    # One row per unit: exactly one of its options. HiGHS compares with absolute tolerances, so costs of order 1 are what it solves best.
    cost = errors.flatten().numpy() / max(float(errors.max()), torch.finfo(torch.float64).tiny)
    index = np.arange(units * options)
    one_each = coo_array((np.ones(units * options), (index // options, index)), shape=(units, units * options))
    within = LinearConstraint(times.flatten().numpy()[None] / budget, ub=1)
    found = milp(cost, integrality=np.ones_like(cost), bounds=Bounds(0, 1), constraints=[LinearConstraint(one_each.tocsc(), 1, 1), within])
    if found.x is None:
        raise RuntimeError(f"milp: {found.message}")
    choice: list[int] = found.x.reshape(units, options).argmax(1).tolist()
    return choice


def exchanges(choice: Sequence[int], errors: Tensor, times: Tensor, budget: float, count: int) -> list[list[int]]:
    """The ``count`` most promising choices within the budget that change one unit, or two: one slower, one faster.

    Args:
        choice: One option per unit.
        errors: ``(units, options)``; promising is what changes their sum least.
        times: Likewise.
        budget: In the unit of ``times``.
        count: At most so many, best first.
    """
    units, options = times.shape
    now = torch.arange(units), torch.tensor(choice)
    error, time = ((t - t[now][:, None]).flatten() for t in (errors, times))
    unit = torch.arange(units).repeat_interleave(options)
    left = budget * (1 + 1e-9) - float(times[now].sum())
    # Of each pair (a, b) with a <= b; on the diagonal a alone. The options chosen now change nothing and are left out.
    pair_error, pair_time = error[:, None] + error, time[:, None] + time
    alone = torch.eye(len(unit), dtype=torch.bool)
    pair_error, pair_time = torch.where(alone, error, pair_error), torch.where(alone, time, pair_time)
    changes = torch.ones(units, options, dtype=torch.bool).index_put(now, torch.tensor(False)).flatten()
    allowed = (changes[:, None] & changes) & ((unit[:, None] != unit) | alone) & (pair_time <= left)
    allowed &= torch.ones_like(allowed).triu()
    ranked = pair_error.masked_fill(~allowed, torch.inf).flatten()
    found = []
    for index in ranked.topk(min(count, int(allowed.sum())), largest=False).indices.tolist():
        other = list(choice)
        for move in divmod(index, len(unit)):
            other[move // options] = move % options
        found.append(other)
    return found
