"""The ways of sampling that the demo compares, from the dense model to the best sparse one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from rtlynx.config import SparsityConfig

SENSITIVE_LAYERS = (
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    *(f"single_transformer_blocks.{block}.proj_out" for block in (4, 5, 6)),
)
"""Layers of the shipped model that the last method keeps dense: those whose sparsity costs most velocity error for their FLOPs.

Found by making one layer at a time dense after calibration, on four of the demo's own first prompts with other noise, then comparing sets
on other prompts: the demo flatters this choice a little.
"""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: Identifies it in demo.json.
        title: Its label in tables and pictures.
        about: One sentence for people.
        config: How the layers are made sparse; None leaves the model dense.
        calibration: Which form of compensation is fitted, if any.
    """

    name: str
    title: str
    about: str
    config: SparsityConfig | None = None
    calibration: Literal["paper", "split"] | None = None


def methods(rank: int) -> tuple[Method, ...]:
    """All methods, each adding one idea to the one before; the first is the dense reference.

    Sparse layers of so small a model are slower than dense ones on a GPU, and would stay dense there: what is shown is what sparsity does.
    """
    sparse = partial(SparsityConfig, small_m="sparse")
    return (
        Method("dense", "dense", "The model as it was trained; every other row is compared with it."),
        Method(
            "naive",
            "naive 2:4",
            "Of every 4 neighbouring activations the 2 largest are kept, and nothing makes up for the others.",
            sparse(rank=0, branch="none", norm_compensation=False),
        ),
        Method(
            "norm",
            "+ norm compensation",
            "Every token is rescaled to the norm it had before selection.",
            sparse(rank=0, branch="none"),
        ),
        Method(
            "paper",
            "+ branch (paper)",
            f"RT-Lynx's form: a rank-{rank} branch reads the layer's input and is fitted to what is left of the error.",
            sparse(rank=rank, branch="input"),
            "paper",
        ),
        Method(
            "split",
            "split",
            f"The same rank-{rank} branch reads only what selection dropped, so it spends nothing on what was kept.",
            sparse(rank=rank, branch="dropped"),
            "split",
        ),
        Method(
            "split-skip",
            "split + skip layers",
            "As split, with the most sensitive layers left dense.",
            sparse(rank=rank, branch="dropped", skip=SENSITIVE_LAYERS),
            "split",
        ),
    )
