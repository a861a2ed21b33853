"""Calibration: fit every sparse layer's rank-r branch to the model's own activations, in closed form.

`collect` runs the dense model and accumulates `statistics` of each layer's input; `solve` turns them into the two factors.
"""

from __future__ import annotations

from rtlynx.calibrate.calibrate import calibrate

__all__ = ["calibrate"]
