"""`SparsityConfig`: which layers become sparse, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rtlynx.errors import InvalidArgumentError
from rtlynx.patterns import compile_pattern, first_match
from rtlynx.reference import MAX_RANK, RANK_MULTIPLE

Branch = Literal["none", "input", "dropped"]
"""What the rank-r branch reads: nothing (no branch), the layer's input (the paper's form), or what selection dropped (split)."""
Selection = Literal["magnitude", "weight"]
"""What selection compares: ``|x_j|``, or ``|x_j|·‖W_:j‖``."""
SmallM = Literal["dense", "sparse"]
"""What a layer computes on fewer tokens than the sparse product wins with."""
Precision = Literal["model", "fp8"]
"""Operands of the sparse product: of the model's dtype, or both e4m3."""


@dataclass(frozen=True)
class SparsityConfig:
    """Which layers `rtlynx.apply` makes sparse, and how they compute.

    Attributes:
        include: Globs over full dotted module names (see `rtlynx.patterns`); None lets the model's recipe decide.
        skip: Globs of layers that stay dense although they are included.
        rank: Rank of the branch `rtlynx.calibrate` fits: 0, or a multiple of 16 up to 128.
        ranks: Pairs of a glob and the rank of the layers it names, instead of `rank`; the first that matches counts. May be given as a
            dictionary.
        norm_compensation: Rescale every token to the norm it had before selection (RT-Lynx, arXiv 2605.26632).
        branch: ``"dropped"``: the branch reads what selection dropped (split). ``"input"``: it reads the layer's input
            (the paper's form). ``"none"``: no branch.
        selection: ``"magnitude"`` keeps the 2 largest of 4 ``|x_j|``, ``"weight"`` the 2 largest ``|x_j|·‖W_:j‖``.
        adaln_shift: Whether layers that read LN(h)(1 + scale) + shift select from what is left without that shift, of each sample and step,
            and get ``shift · Wᵀ`` added (see `rtlynx.adaln_shift`): less error, for passes of their own where
            selection does not take it away itself (compiled, with gradients, of several samples). In FLUX.1, SD3.5, Qwen-Image,
            HunyuanVideo.
        dense_first: Share of the way from noise to picture, at its start, on which all layers compute densely (see `rtlynx.dense_steps`).
        dense_last: The same at its end.
        small_m: ``"dense"``: a layer computes the exact dense product when it is called with fewer tokens than the sparse one is
            faster with on its GPU. ``"sparse"``: always sparse.
        precision: ``"model"``: the sparse product multiplies in the model's dtype. ``"fp8"``: it multiplies e4m3 values by an e4m3 copy of
            the weight, on GPUs of compute capability 9.0 (emulated on the CPU); branch, bias and output keep the model's dtype. Needs
            half again the memory of the sparse layers' weights until `rtlynx.compact`, no gradient. A compensation fitted under one serves
            the other.
        share_inputs: Whether layers that read one tensor (q, k and v) select from it once and hold what selection needs in common.
            ``enable_group_offload`` ends it where it moves single layers ahead of time (``offload_type="leaf_level", use_stream=True``).
        fuse: Whether blocks that `rtlynx.fusions` knows hand a layer what is there before the activation (and concatenation) before it:
            the layer's selection then does both, and neither is written to memory. And whether their norms are one kernel each,
            and the rest between their layers is done in fewer passes, eager on GPUs.

    Raises:
        InvalidArgumentError: A value is not one of those above, or a pattern is malformed.
    """

    include: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    rank: int = 64
    ranks: tuple[tuple[str, int], ...] = ()
    norm_compensation: bool = True
    branch: Branch = "dropped"
    selection: Selection = "magnitude"
    adaln_shift: bool = False
    dense_first: float = 0.0
    dense_last: float = 0.0
    small_m: SmallM = "dense"
    precision: Precision = "model"
    share_inputs: bool = True
    fuse: bool = True

    def __post_init__(self) -> None:
        if self.include is not None:
            object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "skip", _patterns("skip", self.skip))
        check_rank("SparsityConfig", self.rank)
        object.__setattr__(self, "ranks", _ranks(self.ranks))
        for name in ("dense_first", "dense_last"):
            _share(name, getattr(self, name))
        _one_of("branch", self.branch, get_args(Branch))
        _one_of("selection", self.selection, get_args(Selection))
        _one_of("small_m", self.small_m, get_args(SmallM))
        _one_of("precision", self.precision, get_args(Precision))
        for name in ("norm_compensation", "adaln_shift", "share_inputs", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError("SparsityConfig", name, repr(getattr(self, name)), "True or False")

    def same_arithmetic(self, other: SparsityConfig) -> bool:
        """Whether a compensation fitted under ``other`` is also right under this one (which layers, ranks and precision may differ).

        A compensation makes up for what selection drops, and in fp8 the same channels are selected and the branch is the same. So they are
        where the activation before is fused.
        """
        fields = ("branch", "selection", "norm_compensation", "adaln_shift")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    @property
    def multiplies_densely(self) -> bool:
        """Whether a sparse layer needs its dense weight in some steps, or for a part of the product."""
        return bool(self.dense_first or self.dense_last or self.adaln_shift)

    def rank_of(self, layer: str) -> int:
        """Rank of the branch of the layer with this name."""
        return rank_of(layer, self.ranks, self.rank)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_dict` turns back into this configuration."""
        values = dataclasses.asdict(self)
        values["ranks"] = [list(pair) for pair in self.ranks]  # not a dictionary: JSON writers may sort its keys, and order counts
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """Inverse of `to_dict`.

        Raises:
            InvalidArgumentError: An unknown key or an invalid value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidArgumentError("SparsityConfig", "keys", ", ".join(unknown), f"only {', '.join(sorted(known))}")
        return cls(**values)


def check_rank(op: str, rank: int) -> None:
    """Refuse a branch rank that the kernels do not take.

    Raises:
        InvalidArgumentError: ``rank`` is not 0 or a multiple of 16 up to 128.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank % RANK_MULTIPLE or not 0 <= rank <= MAX_RANK:
        raise InvalidArgumentError(op, "rank", repr(rank), f"0 or a multiple of {RANK_MULTIPLE} up to {MAX_RANK}")


def rank_of(layer: str, ranks: Sequence[tuple[str, int]], otherwise: int) -> int:
    """The rank paired with the first pattern that names ``layer``, else ``otherwise``."""
    return next((rank for pattern, rank in ranks if first_match(layer, [pattern])), otherwise)


def _ranks(ranks: object) -> tuple[tuple[str, int], ...]:
    pairs = tuple(ranks.items()) if isinstance(ranks, Mapping) else ranks
    if not isinstance(pairs, (tuple, list)) or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise InvalidArgumentError("SparsityConfig", "ranks", repr(ranks), "pairs of a glob and a rank, or a dictionary of these")
    for pattern, rank in pairs:
        compile_pattern(pattern)
        check_rank("SparsityConfig", rank)
    return tuple((pattern, rank) for pattern, rank in pairs)


def _share(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidArgumentError("SparsityConfig", argument, repr(value), "a number from 0 to 1")


def _patterns(argument: str, patterns: object) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise InvalidArgumentError("SparsityConfig", argument, repr(patterns), "a tuple of glob strings")
    for pattern in patterns:
        compile_pattern(pattern)
    return tuple(patterns)


def _one_of(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError("SparsityConfig", argument, repr(value), f"one of {', '.join(map(repr, allowed))}")
