"""From one linear layer to another in its place."""

from __future__ import annotations

from torch import nn

from rtlynx.errors import InvalidArgumentError
from rtlynx.layer_state import LayerState


def take_over(new: nn.Linear, old: nn.Linear) -> None:
    """Give ``new`` everything of ``old`` that is not sparsity: parameters, training flag, hooks, attributes set from outside.

    Hook dictionaries are shared as objects, so that the handles users hold still remove their hooks.

    Raises:
        InvalidArgumentError: The old layer's forward is wrapped; the wrapper is bound to the old layer and cannot move. Or it is compact.
    """
    if isinstance(old, LayerState) and old.is_compact:
        raise InvalidArgumentError(type(new).__name__, "layer", "a compact layer", "one that has its weight: load the model again")
    if "forward" in old.__dict__:
        got, expected = "a layer whose forward is wrapped by a hook", "one without: remove the hook first"
        raise InvalidArgumentError(type(new).__name__, "layer", got, expected)
    own = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"}
    own |= {"dense", "dense_step", "branch", "selection", "norm_compensation", "small_m", "precision", "_values_scale"}
    own |= {"_compact_dtype", "_output_bias_of", "input_group", "sharing", "repeats", "derived", "bias_group", "_call", "shift_reader"}
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in own})
    new.weight, new.bias = old.weight, old.bias
