"""`refit`: no branch, but a weight of its own for the sparse product: least squares of the dense output on what was kept.

``W + ΔW`` with ``ΔWᵀ = (Σ + λ)⁻¹ mean keptᵀ(missed·Wᵀ)`` and Σ the second moment of what was kept; the ridge pulls towards W. It pays where
dropped channels can be told from kept ones.
"""

from __future__ import annotations

from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch


class _Refit:
    name = "refit"
    about = "a second weight for the sparse product, refitted to what is kept; no branch"
    branch: Branch = "none"
    own_weight = True

    def solve(self, problem: Problem) -> Solution:
        moments = problem.moments
        factor = moments.factor("kept", problem.ridge)
        return Solution(weight_change=factor.solve(moments.product("kept", "missed").double() @ problem.wt))


REFIT = _Refit()
