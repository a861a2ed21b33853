"""Free improvements to the selection: vectors that the selection kernel reads, found from samples of a layer's input.

One file per option; `choose` combines them.
"""

from __future__ import annotations

from rtlynx.calibrate.selection.choose import OPTIONS, choose
from rtlynx.calibrate.selection.vectors import Selection

__all__ = ["OPTIONS", "Selection", "choose"]
