"""Calibration: fit every sparse layer's compensation to the model's own activations.

`collect` runs the dense model and keeps `samples` of every distinct input; `fit` chooses the `selection` and solves for each layer by one
of the `methods`, from second `moments` of what selection keeps and drops.
"""

from __future__ import annotations

from rtlynx.calibrate.calibrate import calibrate
from rtlynx.calibrate.methods import METHODS
from rtlynx.calibrate.selection import OPTIONS

__all__ = ["METHODS", "OPTIONS", "calibrate"]
