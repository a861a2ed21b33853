"""`joint`: a branch on what was dropped and a weight of its own, optimal together.

Whatever the branch C is, the best ``ΔW`` is `refit`'s for what C leaves: ``ΔWᵀ = Σkk⁻¹ (Σkm Wᵀ - Σkd C)`` with k kept, m missed, d dropped.
Put in, the error is again a reduced-rank regression, with the part of d and m that kept channels explain taken out:
``Σdd - Σdk Σkk⁻¹ Σkd`` and ``Σdm - Σdk Σkk⁻¹ Σkm``.
"""

from __future__ import annotations

from rtlynx.calibrate.factor import Factor
from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch

_RIDGE = 1e-4
"""For the unexplained part of what is dropped, from which C hardly strays, as in split."""


class _Joint:
    name = "joint"
    about = "split's branch and a refitted weight, optimal together"
    branch: Branch = "dropped"
    own_weight = True

    def solve(self, problem: Problem) -> Solution:
        moments, wt = problem.moments, problem.wt
        kept = moments.factor("kept", problem.ridge)
        kd = moments.product("kept", "dropped").double()
        km = moments.product("kept", "missed").double() @ wt
        explained = kept.solve(kd).T  # Σdk Σkk⁻¹
        unexplained = Factor.of(moments.product("dropped", "dropped").double() - explained @ kd, _RIDGE)
        target = moments.product("dropped", "missed").double() @ wt - explained @ km
        branch = unexplained.branch(target, problem.rank)
        return Solution(branch, kept.solve(km - (kd @ branch.down) @ branch.up.T))


JOINT = _Joint()
