"""`paper`: RT-Lynx's form, a branch on the layer's input with the weight fixed, at the optimum its training aims for.

The best C of rank r in ``mean ‖missed·Wᵀ - X' C‖²``: reduced-rank regression. The ridge keeps C from fitting the noise of directions that
calibration hardly saw.
"""

from __future__ import annotations

from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch


class _Paper:
    name = "paper"
    about = "the RT-Lynx paper's branch on the layer's input, at its closed-form optimum"
    branch: Branch = "input"
    own_weight = False

    def solve(self, problem: Problem) -> Solution:
        return Solution(problem.best_branch(self.branch))


PAPER = _Paper()
