"""What `rtlynx bench profile` makes of ncu's output; a program that answers like ncu stands for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from rtlynx.bench import layer
from rtlynx.bench.profile import fullest, profile
from rtlynx.cli.bench import parsed_layer
from rtlynx.errors import RTLynxError

NAMES = ["ID", "Kernel Name", "gpu__time_duration.sum", *(f"sm__{name}.avg.pct_of_peak_sustained_elapsed" for name in "abc"), "other"]
UNITS = ["", "", "ns", "%", "%", "%", ""]
GEMM = ["0", "void spmm<int, 3>(Params)", "1,234", "75.5", "9.9", "83.25", "7"]
SELECT = ["1", "sparsify(Params)", "500", "", "53", "n/a", "7"]


def fake_ncu(folder: Path, calls: list[str], kernels: list[list[str]], code: int = 0) -> str:
    """A program that takes ncu's arguments, writes which calls it saw for the first shape, and prints a raw page."""
    page = "\n".join(",".join(f'"{cell}"' for cell in line) for line in [NAMES, UNITS, *kernels])
    program = folder / "ncu"
    program.write_text(
        f"""#!{sys.executable}
import json, sys
at = sys.argv.index("rtlynx.bench.profile")
m, n, k = map(int, sys.argv[at + 3].split("x"))
open(sys.argv[at + 1], "w").write(json.dumps([(m, n, k, what) for what in {calls!r}]))
print("==PROF== Connected"); print({page!r}); sys.exit({code})
"""
    )
    program.chmod(0o755)
    return str(program)


def test_a_row_for_each_unit_that_is_used(tmp_path: Path) -> None:
    rows = profile([(4096, 3072, 1536)], 64, fake_ncu(tmp_path, ["gemm", "select"], [GEMM, SELECT]))
    assert {(row.m, row.n, row.k, row.rank) for row in rows} == {(4096, 3072, 1536, 64)}
    assert [(row.what, row.kernel, row.metric.split(".")[0], row.value, row.unit) for row in rows] == [
        ("gemm", "spmm", "gpu__time_duration", 1234, "ns"),
        ("gemm", "spmm", "sm__a", 75.5, "%"),
        ("gemm", "spmm", "sm__c", 83.25, "%"),
        ("select", "sparsify", "gpu__time_duration", 500, "ns"),
        ("select", "sparsify", "sm__b", 53, "%"),
    ]
    assert [(row["what"], row["value"]) for row in fullest(rows, 1)] == [("gemm", 83.25), ("select", 53)]


@pytest.mark.parametrize(
    "kernels, code, message", [([GEMM], 0, "saw 1 kernels, expected one for each of 2 calls"), ([GEMM, SELECT], 3, "failed with 3")]
)
def test_what_does_not_add_up_is_an_error(tmp_path: Path, kernels: list[list[str]], code: int, message: str) -> None:
    with pytest.raises(RTLynxError, match=message):
        profile([(4096, 3072, 1536)], 64, fake_ncu(tmp_path, ["gemm", "select"], kernels, code))


def test_a_missing_ncu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Nsight Compute"):
        profile([(4096, 3072, 1536)], 64)


def test_a_layer_is_three_numbers() -> None:
    assert parsed_layer("4608x12288X3072") == (4608, 12288, 3072)
    with pytest.raises(typer.BadParameter, match="expected MxNxK"):
        parsed_layer("4608x12288")


def test_the_fastest_of_several_kernels_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def times(functions: dict[str, Callable[[], object]], repeats: int, warm_up: int) -> dict[str, float]:
        timed.extend(functions)
        return {"cutlass_mm:a": 2.0, "cutlass_mm:b": 1.0}

    monkeypatch.setattr(layer, "time_interleaved", times)
    calls = {name: (lambda name=name: name) for name in ("gemm", "cutlass_mm:a", "cutlass_mm:b")}
    fastest = layer.fastest_calls(calls)
    assert json.dumps({name: call() for name, call in fastest.items()}) == '{"gemm": "gemm", "cutlass_mm": "cutlass_mm:b"}'
    assert timed == ["cutlass_mm:a", "cutlass_mm:b"]
    assert layer.fastest_calls({"gemm": calls["gemm"]}).keys() == {"gemm"}
