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
class Modulation:
    """A layer that makes the scales, shifts and gates of a block, and which layers read what one of its shifts was added to (adaLN).

    Attributes:
        layer: Its name in the block.
        parts: In how many vectors its output comes; a block in which it is another number has no shift that is known.
        read_by: Which of them is a shift → the layers, in the block, whose input it is part of.
        blocks: Globs of the blocks.
    """

    layer: str
    parts: int
    read_by: tuple[tuple[int, tuple[str, ...]], ...]
    blocks: tuple[str, ...] = ("transformer_blocks.*",)


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
        modulations: Where shifts of single samples and steps come from, for ``SparsityConfig(adaln_shift=True)``.
    """

    name: str
    classes: tuple[str, ...]
    include: tuple[str, ...]
    per_sample: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    paper_skip: tuple[str, ...] = ()
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    clock: Clock = Clock()
    modulations: tuple[Modulation, ...] = ()


ADALN_ZERO = (
    Modulation("norm1.linear", 6, ((0, ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv")), (3, ("ff.net.0.proj",)))),
    Modulation(
        "norm1_context.linear",
        6,
        ((0, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_added_qkv")), (3, ("ff_context.net.0.proj",))),
    ),
)
"""diffusers' ``AdaLayerNormZero`` in blocks of two streams: shift, scale and gate of attention, then of the MLP."""
ADALN_ZERO_SINGLE = Modulation(
    "norm.linear",
    3,
    ((0, ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv", "proj_mlp")),),
    blocks=("single_transformer_blocks.*",),
)
"""``AdaLayerNormZeroSingle``: one shift for all layers that read the block's input."""
