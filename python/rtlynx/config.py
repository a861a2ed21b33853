"""`SparsityConfig`: which layers become sparse, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rtlynx.errors import InvalidArgumentError
from rtlynx.patterns import compile_pattern
from rtlynx.reference import MAX_RANK, RANK_MULTIPLE

Branch = Literal["none", "input", "dropped"]
"""What the rank-r branch reads: nothing (no branch), the layer's input (the paper's form), or what selection dropped (split)."""
Selection = Literal["magnitude", "weight"]
"""What selection compares: ``|x_j|``, or ``|x_j|·‖W_:j‖``."""


@dataclass(frozen=True)
class SparsityConfig:
    """Which layers `rtlynx.apply` makes sparse, and how they compute.

    Attributes:
        include: Globs over full dotted module names (see `rtlynx.patterns`); None lets the model's recipe decide.
        skip: Globs of layers that stay dense although they are included.
        rank: Rank of the branch `rtlynx.calibrate` fits: 0, or a multiple of 16 up to 128.
        norm_compensation: Rescale every token to the norm it had before selection (RT-Lynx, arXiv 2605.26632).
        branch: ``"dropped"``: the branch reads what selection dropped (split). ``"input"``: it reads the layer's input
            (the paper's form). ``"none"``: no branch.
        selection: ``"magnitude"`` keeps the 2 largest of 4 ``|x_j|``, ``"weight"`` the 2 largest ``|x_j|·‖W_:j‖``.

    Raises:
        InvalidArgumentError: A value is not one of those above, or a pattern is malformed.
    """

    include: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    rank: int = 64
    norm_compensation: bool = True
    branch: Branch = "dropped"
    selection: Selection = "magnitude"

    def __post_init__(self) -> None:
        if self.include is not None:
            object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "skip", _patterns("skip", self.skip))
        check_rank("SparsityConfig", self.rank)
        _one_of("branch", self.branch, get_args(Branch))
        _one_of("selection", self.selection, get_args(Selection))
        if not isinstance(self.norm_compensation, bool):
            raise InvalidArgumentError("SparsityConfig", "norm_compensation", repr(self.norm_compensation), "True or False")

    def same_arithmetic(self, other: SparsityConfig) -> bool:
        """Whether a compensation fitted under ``other`` is also right under this configuration (the choice of layers may differ)."""
        return dataclasses.replace(self, include=None, skip=(), rank=0) == dataclasses.replace(other, include=None, skip=(), rank=0)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_dict` turns back into this configuration."""
        values = dataclasses.asdict(self)
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


def _patterns(argument: str, patterns: object) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise InvalidArgumentError("SparsityConfig", argument, repr(patterns), "a tuple of glob strings")
    for pattern in patterns:
        compile_pattern(pattern)
    return tuple(patterns)


def _one_of(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError("SparsityConfig", argument, repr(value), f"one of {', '.join(map(repr, allowed))}")
