"""The rows of quality.csv, as data: what is done to the model in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rtlynx.calibrate.fit import Fit
from rtlynx.config import Precision, Selection, SparsityConfig
from rtlynx.reference import RANK_MULTIPLE

Pruning = Literal["magnitude", "wanda"]
Cost = Literal["time", "work"]
"""What `rtlynx.search` keeps to the budget: measured time, or the work that tensor cores do."""

GROUPS = 4
"""Of timesteps, in the rows whose bias is fitted per group."""
NONE, SHIFT, PERMUTATION, BOTH = (), ("shift",), ("permutation",), ("shift", "permutation")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        method: Its name in the file.
        fit: What is fitted to the sparse layers; None for a row without sparse activations.
        pruning: 2:4 pruned weights instead: by what they are ranked.
        other_precision: Another dtype of the dense model: the noise floor.
        reseeded: Other noise: how far figures of the dense model itself vary.
        steps: Other sampling steps than the bench's, as a share of them.
        skip: Whether the paper's hand-picked layers stay dense.
        dense_first: Share of the steps, at their start, that stay dense.
        dense_last: The same at their end.
        precision: Of the sparse products' operands.
        score: What selection compares, as in `SparsityConfig`.
        adaln: Whether layers select without the shift of adaLN.
        search: Layers and ranks as `rtlynx.search` finds them at what the paper's hand-picked layers cost, counted so; the fit's rank is
            the largest to choose from.
        longer: Whether the branch is trained with more of everything than the bench's settings say (`rtlynx.bench.quality.longer`).
        recipe: Configuration of `rtlynx.search`, instead of sparse layers that are all alike; the fit's ranks are the recipe's.
    """

    method: str
    fit: Fit | None = None
    pruning: Pruning | None = None
    other_precision: bool = False
    reseeded: bool = False
    steps: float = 1.0
    skip: bool = False
    dense_first: float = 0.0
    dense_last: float = 0.0
    precision: Precision = "model"
    score: Selection = "magnitude"
    adaln: bool = False
    search: Cost | None = None
    longer: bool = False
    recipe: SparsityConfig | None = None

    @property
    def selection(self) -> str:
        """The selection's options, as the file names them."""
        if self.fit is None:
            return ""
        return "+".join((*(["weight"] if self.score == "weight" else []), *self.fit.selection)) or "magnitude"

    @property
    def rank(self) -> int:
        return 0 if self.fit is None or self.fit.rule.branch == "none" else self.fit.rank

    @property
    def key(self) -> str:
        """What tells it from every other row."""
        return f"{self.method}/{self.selection}/{self.rank}"


def recipe_row(name: str, config: SparsityConfig) -> Row:
    """What `rtlynx.search` found, fitted as the search fits by default."""
    return Row(name, Fit("split", config.rank, SHIFT, norm_compensation=config.norm_compensation, ranks=config.ranks), recipe=config)


def rows(rank: int, ranks: tuple[int, ...], recipes: Iterable[Row] = ()) -> list[Row]:
    """All rows, those that say most first: what a bench that is stopped has measured by then is what one would want to know.

    Args:
        rank: At which all methods are compared.
        ranks: At which the ones that matter most are.
        recipes: Rows of recipe files.
    """
    return sorted([*_all(rank, ranks), *recipes], key=lambda row: _stage(row, rank))


_CORE = ("norm", "paper", "split", "refit", "joint")
_SKIPS = ("norm_skip", "paper_trained_skip", "split_skip")


def _stage(row: Row, rank: int) -> int:
    """How soon a row is measured; rows of one stage keep their order, in which those that share a selection follow each other."""
    at_rank, selection = row.rank in (0, rank), row.selection
    if row.method in ("dense", "dense_floor", "dense_reseeded"):
        return 0
    if row.method in ("naive", *_CORE, "paper_trained") and at_rank and selection == "magnitude":
        return 1  # the paper's ablation, and every method at equal rank
    if row.method in ("norm", "split", "joint") and at_rank and selection == "shift":
        return 2
    if row.precision == "fp8" and selection in ("magnitude", "shift"):
        return 7
    if row.search is not None or row.recipe is not None or (row.method in _SKIPS and selection in ("magnitude", "shift")):
        return 3  # which layers stay dense
    if row.fit is None:
        return 4  # 2:4 weights, fewer steps
    if row.method in ("norm", "paper", "split", "joint") and at_rank and row.score == "magnitude":
        return 5  # the other selections
    if row.method in ("paper", "split", "joint") and selection in ("magnitude", "shift"):
        return 6  # ranks
    if row.longer:
        return 4
    if row.method == "paper_trained":
        return 9  # the slowest rows
    if ((row.dense_first or row.dense_last) and selection == "shift") or row.score == "weight":
        return 8
    return 9 if selection != "permutation" else 10


def _all(rank: int, ranks: tuple[int, ...]) -> Iterator[Row]:
    yield Row("dense")
    yield Row("dense_floor", other_precision=True)
    yield Row("dense_reseeded", reseeded=True)
    for share in (0.9, 0.8, 0.7):
        yield Row(f"dense_{share:.0%}_of_steps".replace("%", "pct"), steps=share)
    yield Row("weights_magnitude", pruning="magnitude")
    yield Row("weights_wanda", pruning="wanda")
    yield Row("naive", Fit("plain", 0, norm_compensation=False))
    yield from _plain_selection(rank, ranks)
    for selection in (SHIFT, PERMUTATION, BOTH):
        yield from _better_selection(selection, rank, ranks)
    largest = Fit("split", rank + -rank % RANK_MULTIPLE, SHIFT)  # configurations know no other ranks
    yield Row("searched", largest, search="time")
    yield Row("searched_work", largest, search="work")
    yield Row("searched_fp8", largest, search="time", precision="fp8")
    yield Row("split_skip_fp8", largest, skip=True, precision="fp8")
    for options in (NONE, SHIFT, BOTH):
        yield Row("norm", Fit("plain", 0, options), score="weight")
        yield Row("split", Fit("split", rank, options), score="weight")
        yield Row("joint", Fit("joint", rank, options), score="weight")
    for options in (NONE, SHIFT):
        for method, fit in (
            ("norm", Fit("plain", 0, options)),
            ("split", Fit("split", rank, options)),
            ("joint", Fit("joint", rank, options)),
        ):
            yield Row(f"{method}_adaln", fit, adaln=True)


def _plain_selection(rank: int, ranks: tuple[int, ...]) -> Iterator[Row]:
    """The paper's forms, and every method without help from the selection."""
    yield Row("norm", Fit("plain", 0))
    yield Row("norm_skip", Fit("plain", 0), skip=True)
    yield Row("norm_bias", Fit("plain", 0, bias=True))
    yield Row(f"norm_bias{GROUPS}", Fit("plain", 0, bias=GROUPS))
    for each in dict.fromkeys((rank, 2 * rank)):
        yield Row("paper_trained", Fit("paper-trained", each))
    yield Row("paper_trained_longer", Fit("paper-trained", rank), longer=True)
    for each in dict.fromkeys((rank, *ranks)):
        yield Row("paper", Fit("paper", each))
        yield Row("split", Fit("split", each))
    yield Row("paper_trained_skip", Fit("paper-trained", rank), skip=True)
    yield Row("paper_own", Fit("paper", rank, share=False))
    yield Row("split_own", Fit("split", rank, share=False))
    yield Row("split_skip", Fit("split", rank), skip=True)
    yield Row("split_bias", Fit("split", rank, bias=True))
    yield Row(f"split_bias{GROUPS}", Fit("split", rank, bias=GROUPS))
    yield Row("refit", Fit("refit", 0))
    yield Row("joint", Fit("joint", rank))
    yield Row("norm_fp8", Fit("plain", 0), precision="fp8")
    yield Row("paper_fp8", Fit("paper", rank), precision="fp8")
    yield Row("paper_trained_fp8", Fit("paper-trained", rank), precision="fp8")
    yield Row("split_fp8", Fit("split", rank), precision="fp8")
    yield Row("joint_fp8", Fit("joint", rank), precision="fp8")
    for method in ("split", "refit", "joint"):
        yield Row(f"{method}_nonorm", Fit(method, rank if method != "refit" else 0, norm_compensation=False))


def _better_selection(selection: tuple[str, ...], rank: int, ranks: tuple[int, ...]) -> Iterator[Row]:
    plain, split, joint = (Fit(method, each, selection) for method, each in (("plain", 0), ("split", rank), ("joint", rank)))
    yield Row("norm", plain)
    yield Row("paper", Fit("paper", rank, selection))
    for each in dict.fromkeys((rank, *ranks)):
        yield Row("split", replace(split, rank=each))
        yield Row("joint", replace(joint, rank=each))
    yield Row("split_skip", split, skip=True)
    yield Row("split_fp8", split, precision="fp8")
    yield Row("joint_fp8", joint, precision="fp8")
    for share in (0.1, 0.2):
        yield Row(f"split_first_{share:.0%}_dense".replace("%", "pct"), split, dense_first=share)
        yield Row(f"split_last_{share:.0%}_dense".replace("%", "pct"), split, dense_last=share)
    yield Row("refit", Fit("refit", 0, selection))
    for bias, suffix in ((True, ""), (GROUPS, str(GROUPS))):  # fits with one bias share their moments
        yield Row(f"norm_bias{suffix}", replace(plain, bias=bias))
        yield Row(f"split_bias{suffix}", replace(split, bias=bias))
        yield Row(f"joint_bias{suffix}", replace(joint, bias=bias))
    for row in (Row("norm", plain), Row("split", split), Row("joint", joint)):
        assert row.fit is not None
        yield replace(row, method=f"{row.method}_nonorm".replace("norm_nonorm", "nonorm"), fit=replace(row.fit, norm_compensation=False))
