"""Where rows are kept: ``quality-<model>.json`` with everything, as they come, and from all of these quality.csv and three more tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rtlynx.errors import InvalidArgumentError
from rtlynx.evaluate.bootstrap import interval_of
from rtlynx.report import write_json, write_text

COLUMNS = ("model", "method", "selection", "rank", "velocity_rel_err", "psnr_db", "frechet", "attribute_accuracy", "layer_ms")
_WITH_INTERVALS = (
    "velocity_rel_err",
    "psnr_db",
    "frechet",
    "frechet_minus_dense",
    "attribute_accuracy",
    "attribute_accuracy_minus_dense",
)

_FINGERPRINT = "fingerprint"
_AGAINST = (
    ("paper_trained", "magnitude"),
    ("split", "shift"),
    ("joint", "shift"),
    ("split_skip", "shift"),
    ("split_skip_fp8", "shift"),
)
"""Method and selection of the rows that all others are compared with, prompt by prompt: the paper's form, the two tiers, and the paper's
hand-picked layers."""


class Results:
    """The rows of one model, on disk after each one, so that an interrupted bench goes on.

    Args:
        folder: For all files, e.g. ``benches/results/nvidia-h200``.
        model: Its name in the tables.
        settings: What the figures depend on; ``fingerprint`` among them tells models of one name apart. Files of before it was stored are
            gone on with, and stay without it: nobody knows which weights their rows are of.

    Raises:
        InvalidArgumentError: The file holds rows measured under other settings.
    """

    def __init__(self, folder: Path, model: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / f"quality-{model}.json"
        self.model, self.settings = model, json.loads(json.dumps(settings))
        self.rows = self._stored()["rows"]

    def _stored(self) -> dict[str, Any]:
        """The file: settings, header and rows."""
        if not self.path.is_file():
            return {"settings": self.settings, "header": [], "rows": {}}
        stored: dict[str, Any] = json.loads(self.path.read_text())
        before = stored["settings"]
        wanted = {key: value for key, value in self.settings.items() if key != _FINGERPRINT or key in before}
        if before != wanted:
            changed = [key for key in {**wanted, **before} if key not in wanted or before.get(key) != wanted[key]]
            got = f"{self.path} measured with another {', '.join(changed)}"
            raise InvalidArgumentError("bench quality", "out", got, "another folder, or no such file: remove it to measure anew")
        return stored

    def add(self, key: str, row: Mapping[str, Any], header: Iterable[str]) -> None:
        """Keep a row, beside those that other processes and runs before have added, and write all files; the header names each of them."""
        with _alone_in(self.folder):
            stored = self._stored()
            self.rows = {**stored["rows"], key: {"model": self.model, **row}}
            write_json(self.path, {**stored, "header": list(dict.fromkeys([*stored["header"], *header])), "rows": self.rows})
            write_tables(self.folder)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside the block no other process is in such a block for the same folder; a process that dies leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_tables(folder: Path) -> list[Path]:
    """Make quality.csv, quality_intervals.csv, quality_paired.csv and quality_layers.csv from the JSON files of all models in a folder."""
    stored = [json.loads(path.read_text()) for path in sorted(folder.glob("quality-*.json"))]
    header = [f"# {line}\n" for file in stored for line in [f"model: {_model(file)}", *file["header"]]]
    rows = [row for file in stored for row in sorted(file["rows"].values(), key=_place)]
    tables = {
        "quality.csv": (COLUMNS, [{key: _value(row[key]) for key in COLUMNS} for row in rows]),
        "quality_intervals.csv": (("model", "method", "selection", "rank", "figure", "value", "low", "high"), _intervals(rows)),
        "quality_paired.csv": (
            (*COLUMNS[:4], "against", "figure", "value", "low", "high"),
            [line for file in stored for line in _paired(file)],
        ),
        "quality_layers.csv": (("model", "method", "selection", "rank", "layer", "rel_err"), _layers(rows)),
    }
    for name, (columns, lines) in tables.items():
        text = io.StringIO()
        text.writelines(header)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: _printed(value) for key, value in line.items()})
        write_text(folder / name, text.getvalue())
    return [folder / name for name in tables]


_SELECTIONS = ("", "magnitude", "weight", "shift", "weight+shift", "permutation", "shift+permutation", "weight+shift+permutation")


def _place(row: Mapping[str, Any]) -> tuple[int, bool]:
    """Rows of one selection together, the dense one first; else as they were measured, which is in the order of what says most."""
    return _SELECTIONS.index(row["selection"]), row["method"] != "dense"


def _model(file: Mapping[str, Any]) -> str:
    return str(next(iter(file["rows"].values()))["model"])


def _value(figure: Any) -> Any:
    """A figure without its interval."""
    return figure[0] if isinstance(figure, list) else figure


def _printed(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else ""
    return "" if value is None else value


def _intervals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures with their intervals, and one that has none: the dense layers' time that each row's `layer_ms` is to be divided by."""
    lines = []
    for row in rows:
        key = {key: row[key] for key in COLUMNS[:4]}
        spans = {figure: row[figure] for figure in _WITH_INTERVALS}
        spans["dense_layer_ms"] = None if (ms := row.get("dense_layer_ms")) is None else (ms, None, None)  # older rows lack it
        for figure, span in spans.items():
            if span is not None:
                lines.append({**key, "figure": figure, "value": span[0], "low": span[1], "high": span[2]})
    return lines


def _paired(file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How much larger a figure is than in another row over the same prompts, with the interval of the difference.

    The other row has the same rank where there is such a row; else it is the first that was measured, which has the bench's rank.
    """
    rows = file["rows"].values()
    lines = []
    for row, (method, selection) in itertools.product(rows, _AGAINST):
        others = [other for other in rows if (other["method"], other["selection"]) == (method, selection)]
        other = next((other for other in others if other["rank"] == row["rank"]), others[0] if others else None)
        if other is None or other is row:
            continue
        mine, theirs = row.get("replicates", {}), other.get("replicates", {})
        for figure in mine.keys() & theirs.keys():
            pairs = list(zip(mine[figure], theirs[figure], strict=True))
            if not any(value is None for pair in pairs for value in pair):  # as what is not finite is stored: the PSNR of equal pictures
                differences = [a - b for a, b in pairs]
                value, low, high = interval_of(differences)
                key = {name: row[name] for name in COLUMNS[:4]}
                against = f"{method}/{selection}/{other['rank']}"
                lines.append({**key, "against": against, "figure": figure, "value": value, "low": low, "high": high})
    return sorted(
        lines, key=lambda line: (_SELECTIONS.index(line["selection"]), line["method"], line["rank"], line["against"], line["figure"])
    )


def _layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean error of every kind of layer: names with the number of their block taken out."""
    lines = []
    for row in rows:
        kinds: dict[str, list[float]] = {}
        for name, error in row["layer_rel_err"].items():
            block, _, rest = name.partition(".")
            kinds.setdefault(f"{block}.*.{rest.partition('.')[2]}", []).append(error)
        for kind, errors in kinds.items():
            lines.append({**{key: row[key] for key in COLUMNS[:4]}, "layer": kind, "rel_err": sum(errors) / len(errors)})
    return lines
