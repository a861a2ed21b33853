"""`plain`: no branch and the layer's own weight; what selection's options and the bias do alone."""

from __future__ import annotations

from rtlynx.calibrate.problem import Problem, Solution
from rtlynx.config import Branch


class _Plain:
    name = "plain"
    about = "no branch: only the selection and the bias are fitted"
    branch: Branch = "none"
    own_weight = False

    def solve(self, problem: Problem) -> Solution:
        return Solution()


PLAIN = _Plain()
