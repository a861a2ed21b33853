"""The methods of compensation, one file each; `METHODS` names them."""

from __future__ import annotations

from rtlynx.calibrate.methods.joint import JOINT
from rtlynx.calibrate.methods.paper import PAPER
from rtlynx.calibrate.methods.paper_trained import PAPER_TRAINED
from rtlynx.calibrate.methods.plain import PLAIN
from rtlynx.calibrate.methods.refit import REFIT
from rtlynx.calibrate.methods.split import SPLIT
from rtlynx.calibrate.problem import Method

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {method.name: method for method in (SPLIT, PAPER, PAPER_TRAINED, REFIT, JOINT, PLAIN)}
"""Name → method."""
