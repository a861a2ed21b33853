"""What stands before a sparse layer (an activation, a concatenation) goes into its selection: one file for each kind of block.

What blocks do between their layers, norms, rotary embeddings and gated sums, is done in fewer passes in eager mode.

A block that is known here gets a subclass of its own class, with a forward that hands the layer what comes before the activation. With
every call it asks whether that is what the original forward would do (`fusion.plain`), and otherwise calls that one. Parameters, names and
state dicts stay as they are. A forward may outlive its class in a hook of accelerate's, so it asks nothing of `self` that the original
class does not have.
"""

from __future__ import annotations

from rtlynx.fusions.install import fused_layers, install_fusions

__all__ = ["fused_layers", "install_fusions"]
