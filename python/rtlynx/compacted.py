"""What compact layers (`rtlynx.compact`) can no longer do, refused before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rtlynx.config import SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.layer_state import LayerState

if TYPE_CHECKING:
    from rtlynx.eligibility import Candidate


def refuse_compact(op: str, layers: Mapping[str, LayerState], expected: str) -> None:
    """Refuse ``op``, which needs the weights that compact layers gave up.

    Args:
        op: What is refused.
        layers: Name → the layers it is about.
        expected: What it needs, or what to do instead.

    Raises:
        InvalidArgumentError: One of them is compact.
    """
    compact = [name for name, layer in layers.items() if layer.is_compact]
    if compact:
        got = f"{len(compact)} compact layers (first {compact[0]}), whose weights rtlynx.compact gave up"
        raise InvalidArgumentError(op, "pipe_or_module", got, expected)


def check_reconfigured(judged: Sequence[Candidate], config: SparsityConfig, *, keep: bool) -> None:
    """Refuse a configuration under which a compact layer would be another than it is.

    Args:
        judged: The layers of a model under ``config``.
        config: The configuration.
        keep: Whether compensations fitted so far are right under it.

    Raises:
        InvalidArgumentError: A compact layer would become dense, multiply in another precision, select by another rule, lose its
            compensation or compute densely without a weight for that.
    """
    for candidate in judged:
        layer = candidate.module
        if not isinstance(layer, LayerState) or not layer.is_compact:
            continue
        got = None
        if candidate.reason is not None:
            got = f"one that makes the compact layer {candidate.name} dense ({candidate.reason})"
        elif (config.precision, config.selection) != (layer.precision, layer.selection):
            got = f'precision="{config.precision}", selection="{config.selection}" for the compact layer {candidate.name}'
        elif layer.compact_fitted is not None and config.multiplies_densely:
            got = f"one with dense steps or adaln_shift for the compact layer {candidate.name}, whose weight was fitted for sparse products"
        elif layer.rank and not keep:
            got = f"one that the compensation of the compact layer {candidate.name} was not fitted for"
        if got is not None:
            kept = f'precision="{layer.precision}", selection="{layer.selection}" and the branch it has'
            raise InvalidArgumentError("apply", "config", got, f"{kept}, or the model loaded again")
