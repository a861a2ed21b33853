"""Result files: CSV under ``#`` header lines, and what is read off their rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rtlynx.bench.activation import ActivationTimes
from rtlynx.bench.calibration import CalibrationTimes
from rtlynx.bench.energy import Energy
from rtlynx.bench.epilogue import EpilogueTimes
from rtlynx.bench.host import HostTime
from rtlynx.bench.norm_rotary import NormRotaryTimes
from rtlynx.bench.profile import Utilisation
from rtlynx.bench.tiles import KernelTime
from rtlynx.io import atomic_path
from rtlynx.layer_times import LayerTimes

Row = LayerTimes | Energy | ActivationTimes | NormRotaryTimes | EpilogueTimes | CalibrationTimes | Utilisation | HostTime | KernelTime


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Row], kind: type[Row] = LayerTimes) -> None:
    """Write rows of one kind under ``#`` header lines, whole or not at all."""
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in header)
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()})
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def break_even(rows: Sequence[LayerTimes]) -> dict[tuple[int, int], int | None]:
    """For every (N, K) measured with several M: the fewest tokens from which the sparse layer is never slower than the dense one.

    None where the largest M measured is still slower. That M is measured, not where two lines would cross.
    """
    by_features: dict[tuple[int, int], list[LayerTimes]] = {}
    for row in rows:
        by_features.setdefault((row.n, row.k), []).append(row)
    found: dict[tuple[int, int], int | None] = {}
    for features, group in by_features.items():
        if len(group) > 1:
            found[features] = None
            for row in sorted(group, key=lambda row: row.m, reverse=True):
                if row.layer_ms > row.dense_ms:
                    break
                found[features] = row.m
    return found
