"""Units that are fitted already, beside the recipe in the making, so that an interrupted search goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rtlynx.calibrate.fit import Tensors
from rtlynx.calibrate.workfolder import WorkFolder
from rtlynx.linear import SparseLinear
from rtlynx.search.options import Unit, together

_OF = "@"
"""Between the name of a layer and the rank that was fitted: names have none."""
_TOKENS = "tokens"


def store(folder: WorkFolder, units: Sequence[Unit]) -> None:
    """Write the units of one input: all or none."""
    solved: dict[str, Tensors] = {}
    for unit in units:
        for rank, fitted in unit.fitted.items():
            solved |= {f"{name}{_OF}{rank}": tensors for name, tensors in fitted.items()}
        if unit.tokens is not None:
            solved[f"{unit.name}{_OF}{_TOKENS}"] = {_TOKENS: unit.tokens}
    folder.save(solved)


def stored(folder: WorkFolder, layers: Mapping[str, SparseLinear]) -> list[Unit]:
    """The units of ``layers`` that were written."""
    return [unit for solved in folder.rounds() for unit in _units(solved, layers)]


def _units(solved: Mapping[str, Tensors], layers: Mapping[str, SparseLinear]) -> list[Unit]:
    fitted: dict[str, dict[int, Tensors]] = {}
    tokens: dict[str, Tensors] = {}
    for key, tensors in solved.items():
        name, _, what = key.rpartition(_OF)
        if what == _TOKENS:
            tokens[name] = tensors
        else:
            fitted.setdefault(name, {})[int(what)] = tensors
    units = []
    for mine in together({name: layers[name] for name in fitted}):
        first = next(iter(mine))
        units.append(
            Unit(mine, {rank: {name: fitted[name][rank] for name in mine} for rank in fitted[first]}, tokens.get(first, {}).get(_TOKENS))
        )
    return units
