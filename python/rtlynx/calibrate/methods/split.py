"""`split`: the branch reads what selection dropped, D = X' - S(X'); the weight stays.

The best C of rank r in ``mean ‖missed·Wᵀ - D C‖²``. Without norm compensation what is missed is what is dropped, Σ = L Lᵀ, and
``C = L⁻ᵀ [Lᵀ Wᵀ]_r``: the directions in which dropping hurts most. C never leaves Wᵀ far, so the ridge hardly matters.
"""

from __future__ import annotations

from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch


class _Split:
    name = "split"
    about = "a branch on what selection dropped, in closed form; the weight is untouched"
    branch: Branch = "dropped"
    own_weight = False

    def solve(self, problem: Problem) -> Solution:
        return Solution(problem.best_branch(self.branch))


SPLIT = _Split()
