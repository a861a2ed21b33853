"""`Recipe`: which layers of a model family carry its tokens, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """How a model is told how noisy its input is, which grows in a straight line from picture to noise.

    Attributes:
        argument: Of the model's forward.
        noise: Its value for pure noise.
        picture: Its value for a picture without noise.
    """

    argument: str = "timestep"
    noise: float = 1000.0
    picture: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """The linear layers of one model family, as globs over full dotted names (`rtlynx.patterns`).

    Attributes:
        name: What logs and summaries call it.
        classes: Names of the model classes it serves; subclasses are served too.
        include: Layers worth making sparse: they see every token.
        per_sample: Layers that see one row per sample (modulation, time embedding): nothing to gain, they stay dense.
        ends: Where tokens enter and leave the model: a negligible share of the work, and errors there reach every block.
        paper_skip: Layers RT-Lynx (arXiv 2605.26632) keeps dense by hand, for ``SparsityConfig(skip=...)``. The paper names
            kinds of layers rather than paths: this is our reading of it.
        shared_inputs: Groups of layers, relative to their block, that read the same tensor.
        clock: How it is told the time.
    """

    name: str
    classes: tuple[str, ...]
    include: tuple[str, ...]
    per_sample: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    paper_skip: tuple[str, ...] = ()
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    clock: Clock = Clock()
