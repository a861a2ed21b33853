"""What every option of every unit costs in one step: measured on the GPU, or estimated from a table of the bench."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rtlynx.config import Precision, SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.layer_times import LayerTimes, read_csv
from rtlynx.linear import SparseLinear
from rtlynx.search.options import Option, Unit
from rtlynx.sharing import InputGroup
from rtlynx.timing import time_interleaved

WORK = "work"
"""Count what tensor cores do, whatever the kernels reach: a sparse product half of a dense one, a branch by its rank."""


def option_times(
    units: Sequence[Unit], options: Sequence[Option], rows: Sequence[int], config: SparsityConfig, table: str | os.PathLike[str] | None
) -> tuple[Tensor, str]:
    """``(units, options)`` milliseconds (of work: TFLOP), and where they come from.

    Args:
        units: With their layers where they run.
        options: Of every unit.
        rows: Tokens of every unit in one call.
        config: How sparse layers compute.
        table: ``layer.csv`` of ``rtlynx bench gemm``, to use instead of this machine, or `WORK`.

    Raises:
        InvalidArgumentError: There is neither a GPU nor a table, or the table lacks the times of the configuration's precision.
    """
    if table == WORK:
        found = [[_work(unit, option, m) for option in options] for unit, m in zip(units, rows, strict=True)]
        return torch.tensor(found, dtype=torch.float64), "counted as work, in TFLOP"
    if table is not None:
        header, measured = read_csv(Path(table))
        estimate = _Table(measured, config.precision)
        times = [[estimate.unit_ms(unit, option, m) for option in options] for unit, m in zip(units, rows, strict=True)]
        return torch.tensor(times, dtype=torch.float64), f"estimated from {header.get('gpu', 'another machine')}'s table"
    device = next(iter(units[0].layers.values())).weight.device
    if device.type != "cuda":
        raise InvalidArgumentError(
            "search", "times", f"none, and a model on {device}", "the layer.csv of a GPU (rtlynx bench gemm --out), or 'work'"
        )
    alike: dict[tuple[int, object], list[Unit]] = {}  # most models repeat a handful of shapes
    for unit, m in zip(units, rows, strict=True):
        alike.setdefault(_shape(unit, m), []).append(unit)
    known = {(m, shape): _measured(same, options, m, config) for (m, shape), same in alike.items()}
    times = [known[_shape(unit, m)] for unit, m in zip(units, rows, strict=True)]
    return torch.tensor(times, dtype=torch.float64), f"measured on {torch.cuda.get_device_name(device)}"


def _work(unit: Unit, option: Option, m: int) -> float:
    layers = unit.layers.values()
    if option is None:
        return sum(2e-12 * m * layer.out_features * layer.in_features for layer in layers)
    down = 2e-12 * m * next(iter(layers)).in_features * option
    return down + sum(2e-12 * m * layer.out_features * (layer.in_features / 2 + option) for layer in layers)


def _shape(unit: Unit, rows: int) -> tuple[int, object]:
    return rows, tuple((layer.in_features, layer.out_features, layer.bias is None, layer.weight.dtype) for layer in unit.layers.values())


@torch.no_grad()
def _measured(alike: Sequence[Unit], options: Sequence[Option], rows: int, config: SparsityConfig) -> list[float]:
    """Of the first of units of one shape, on tokens of all of them."""
    x = _tokens(alike, rows)
    times = time_interleaved({str(o): _call(alike[0], option, x, config) for o, option in enumerate(options)}, repeats=20)
    return [times[str(o)] for o in range(len(options))]


def _tokens(alike: Sequence[Unit], rows: int) -> Tensor:
    """``(rows, K)`` that the units select from, each repeated as often as needed; random ones where none were read.

    What is in the tokens decides how much power a product draws, and so at which clock it runs.
    """
    weight = next(iter(alike[0].layers.values())).weight
    read = [unit.tokens for unit in alike if unit.tokens is not None and len(unit.tokens)]
    if not read:
        return torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    x = torch.cat(read)
    x = x[torch.arange(rows) * max(1, len(x) // rows) % len(x)]  # of every unit, where there are more than rows
    return x.to(weight.device, weight.dtype)


def _call(unit: Unit, option: Option, x: Tensor, config: SparsityConfig) -> Callable[[], None]:
    """The unit's layers on ``x`` with an option, as layers of their own that share the weights."""
    group, layers = InputGroup(), []
    for name, layer in unit.layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        twin = SparseLinear.from_linear(plain, config)
        group.join(twin)
        twin.dense = option is None
        if option is not None:
            twin.set_compensation(**unit.fitted[option][name])
        layers.append(twin)

    def run() -> None:
        for layer in layers:
            layer(x)

    return run


class _Table:
    """Times of layers that were measured, carried over to others by the work they do."""

    def __init__(self, rows: Sequence[LayerTimes], precision: Precision) -> None:
        self.rows = rows
        self._suffix = "_e4m3_ms" if precision == "fp8" else "_ms"
        if any(math.isnan(self._sparse_ms(row, part)) for row in rows for part in ("gemm", "select")):
            got, expected = f"a table without gemm{self._suffix}", f'one of a GPU that runs precision="{precision}"'
            raise InvalidArgumentError("search", "times", got, expected)

    def _sparse_ms(self, row: LayerTimes, part: str) -> float:
        return getattr(row, part + self._suffix)  # type: ignore[no-any-return]

    def unit_ms(self, unit: Unit, option: Option, m: int) -> float:
        """A unit's layers one after the other; those that are sparse select once."""
        sizes = [(layer.out_features, layer.in_features) for layer in unit.layers.values()]
        if option is None:
            return sum(self._dense_ms(m, n, k) for n, k in sizes)
        return self._select_ms(m, *sizes[0]) + sum(self._gemm_ms(m, n, k, option) for n, k in sizes)

    def _nearest(self, m: int, n: int, k: int) -> LayerTimes:
        return min(self.rows, key=lambda row: sum(abs(math.log(a / b)) for a, b in ((m, row.m), (n, row.n), (k, row.k))))

    def _dense_ms(self, m: int, n: int, k: int) -> float:
        row = self._nearest(m, n, k)
        return row.dense_ms * (m * n * k) / (row.m * row.n * row.k)

    def _gemm_ms(self, m: int, n: int, k: int, rank: int) -> float:
        """Sparse tensor cores do a product of K at the pace of K/2; the branch adds its rank."""
        row = self._nearest(m, n, k)
        return self._sparse_ms(row, "gemm") * (m * n * (k / 2 + rank)) / (row.m * row.n * (row.k / 2 + row.rank))

    def _select_ms(self, m: int, n: int, k: int) -> float:
        """Moving X bounds selection, whatever the rank."""
        row = self._nearest(m, n, k)
        return self._sparse_ms(row, "select") * (m * k) / (row.m * row.k)
