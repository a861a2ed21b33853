"""Every linear layer of the models of `full_size_models`, sparse or dense and why, as `tests/layers/<model>.txt` has them.

A line with a range, ``blocks.{0..39}.attn1.to_q``, stands for a layer in each of these blocks. After a change of a recipe, write the files
anew and read the diff:

    python tests/pinned_layers.py
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import rtlynx
from full_size_models import CASES

FOLDER = Path(__file__).parent / "layers"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LINE = re.compile(r"(sparse|dense) +(\d+) → (\d+) +([^\s:]+)(?:: (.+))?")


class Layer(NamedTuple):
    """One linear layer; `why_dense` is empty if it is sparse."""

    name: str
    in_features: int
    out_features: int
    why_dense: str


def found(summary: rtlynx.Summary) -> list[Layer]:
    return [Layer(row.name, row.in_features, row.out_features, row.reason) for row in summary]


def pinned(model: str) -> list[Layer]:
    """What the model's file says."""
    return list(unfolded(_lines(model)))


def changes(model: str, layers: Iterable[Layer]) -> str:
    """Lines that are not in the model's file, or only there."""
    return "\n".join(difflib.unified_diff(_lines(model), folded(layers), f"tests/layers/{model}.txt", "rtlynx.summary", n=0, lineterm=""))


def _lines(model: str) -> list[str]:
    return (FOLDER / f"{model}.txt").read_text(encoding="utf-8").splitlines()


def folded(layers: Iterable[Layer]) -> list[str]:
    """As lines: each kind of layer where it comes first."""
    runs: list[tuple[Layer, list[int]]] = []
    latest: dict[Layer, list[int]] = {}
    for layer in layers:
        number = [int(digits) for digits in _NUMBER.findall(layer.name)[:1]]
        kind = layer._replace(name=_NUMBER.sub("#", layer.name, count=1))
        if number and kind in latest and latest[kind][-1] + 1 == number[0]:
            latest[kind] += number
        else:
            latest[kind] = number
            runs.append((kind, number))
    return [_line(kind, numbers) for kind, numbers in runs]


def _line(kind: Layer, numbers: list[int]) -> str:
    blocks = f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else "".join(map(str, numbers))
    state, why = ("dense", f": {kind.why_dense}") if kind.why_dense else ("sparse", "")
    return f"{state:<6} {kind.in_features:>5} → {kind.out_features:<5}  {kind.name.replace('#', blocks)}{why}"


def unfolded(lines: Iterable[str]) -> Iterator[Layer]:
    for line in lines:
        parts = _LINE.fullmatch(line)
        assert parts is not None, f"not a layer: {line!r}"
        state, k, n, name, why = parts.groups(default="")
        assert (state == "dense") == bool(why), f"dense layers have a reason, sparse ones none: {line!r}"
        blocks = _RANGE.search(name)
        numbers = range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [0]
        yield from (Layer(_RANGE.sub(str(number), name), int(k), int(n), why) for number in numbers)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for model, case in CASES.items():
        lines = folded(found(rtlynx.summary(rtlynx.apply(case.on_meta()))))
        (FOLDER / f"{model}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
