"""What `rtlynx.search` finds on the bench's own samples, at what the layers cost that the paper picked by hand: the rows ``searched…``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from rtlynx.bench.quality.rows import Cost
from rtlynx.calibrate.collect import LayerInput, all_dense
from rtlynx.calibrate.fit import Fit
from rtlynx.calibrate.runs import Run
from rtlynx.config import SparsityConfig
from rtlynx.linear import SparseLinear
from rtlynx.reference import RANK_MULTIPLE
from rtlynx.search.effects import Effects
from rtlynx.search.options import Option, Unit, fit_units
from rtlynx.search.search import Chooser, config_of, record
from rtlynx.search.times import WORK, option_times

_CALLS = 8
_REFINE = 8


@dataclass(frozen=True)
class Found:
    """A choice for every unit.

    Attributes:
        choice: Unit and its option.
        config: The recipe; None where nothing is sparse.
        about: What was measured on the way, JSON-able.
    """

    choice: list[tuple[Unit, Option]]
    config: SparsityConfig | None
    about: dict[str, Any]


class Searcher:
    """Fits and probes once, then chooses for any cost.

    Args:
        model: The transformer.
        layers: Its sparse layers.
        inputs: Samples to fit from.
        fit: How; its rank is the largest to choose from.
        config: How the layers compute.
        held_out: Runs on prompts to judge by, neither those that were fitted from nor those that the bench samples.
        scale: Tokens of the bench's calls, as a multiple of those of a held-out run's.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SparseLinear],
        inputs: Sequence[LayerInput],
        fit: Fit,
        config: SparsityConfig,
        held_out: Sequence[Run],
        scale: float,
        progress: bool,
    ) -> None:
        self.model, self.config, self.scale = model, config, scale
        self.options = options_up_to(fit.rank)
        device = next(iter(layers.values())).weight.device
        with tqdm(desc="search: probes", total=_CALLS * len(held_out), disable=not progress, leave=False) as bar:
            ranks = [option for option in self.options if option is not None]
            self.units = [unit for units in fit_units(inputs, fit, ranks, device) for unit in units]
            for layer in layers.values():
                layer.set_compensation()
            with all_dense(layers):
                self.trajectory = record(model, held_out, _CALLS)
                self.effects = Effects(self.units, self.options)
                for _ in self.effects.measure(model, self.trajectory, 1, fit.seed):
                    bar.update()

    def find(self, cost: Cost) -> Found:
        """The best choice that costs no more than the paper's hand-picked layers dense and the others sparse with the largest rank."""
        for unit in self.units:
            unit.choose(None)
        rows = [max(1, round(rows * self.scale)) for rows in self.effects.rows]
        times, source = option_times(self.units, self.options, rows, self.config, WORK if cost == "work" else None)
        chooser = Chooser(self.model, self.units, self.options, self.effects.single, times, self.trajectory, lambda: None)
        limit = chooser.limit("paper")
        points, best = chooser.choose(limit, _REFINE)
        choice = [(unit, self.options[o]) for unit, o in zip(self.units, best, strict=True)]
        some = any(option is not None for _, option in choice)
        about = {"times": source, "limit": limit, "of_dense": limit / chooser.dense, "points": [asdict(point) for point in points]}
        return Found(choice, config_of(self.config, self.units, [option for _, option in choice]) if some else None, about)


def options_up_to(rank: int) -> list[Option]:
    """Dense, no branch, and ranks that double up to ``rank``, which is one of them."""
    ranks = {0, rank}
    while (rank := rank // 2) and rank % RANK_MULTIPLE == 0:
        ranks.add(rank)
    return [None, *sorted(ranks)]
