"""The bench of the host's time: parts that sum to the whole, what each of them runs, and its file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig, _core, launch, layer_call
from rtlynx.bench import host, machine
from rtlynx.bench.host import LOOP, WHOLE, HostTime, Timed, dense_call, parts, sparse_call
from rtlynx.cli import app
from rtlynx.layer_call import LayerCall

K, N, RANK = 128, 64, 16


def leaves(timed: Timed) -> dict[str, Timed]:
    """Every call of a tree, by the name of its part."""
    return {timed.part: timed} | {part: call for within in timed.within for part, call in leaves(within).items()}


def test_parts_are_what_is_left_and_sum_to_the_whole() -> None:
    ran: list[str] = []

    def timed(part: str, *within: Timed) -> Timed:
        return Timed(part, lambda: ran.append(part), within)

    times = {"module": 21.0, "checks": 17.0, "read": 4.0, "both": 9.0, "select": 5.0, "multiply": 5.5}

    def clock(call: Callable[[], object]) -> float:
        ran.clear()
        call()
        return 0.5 + (times[ran[0]] if ran else 0.0)

    tree = timed("module", timed("checks", timed("read"), timed("both", timed("select"), timed("multiply"))))
    found = parts(tree, clock)
    assert list(found) == [WHOLE, "module", "checks", "read", "both", "select", "multiply", LOOP]
    own = {"module": 4.0, "checks": 4.0, "read": 4.0, "both": -1.5, "select": 5.0, "multiply": 5.5}
    assert found == {WHOLE: 21.5, **own, LOOP: 0.5}
    assert sum(us for part, us in found.items() if part != WHOLE) == found[WHOLE]


class Recorder:
    """Stands for `_core.Layer`: what would be launched is written down."""

    def __init__(self, *made_with: object) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.workspace_bytes = _core.Layer(*made_with).workspace_bytes  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))


@torch.no_grad()
def test_the_parts_of_a_sparse_call_are_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_call, "direct", lambda *_: not torch.is_grad_enabled())
    monkeypatch.setattr(launch, "stream", lambda _: 7)
    layer = SparseLinear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16), SparsityConfig(small_m="sparse"))
    layer.set_compensation(torch.randn(K, RANK), torch.randn(N, RANK))
    x = torch.randn(1, 5, K, dtype=torch.bfloat16)
    layer._call = LayerCall(layer, x, SimpleNamespace(Layer=Recorder))  # type: ignore[arg-type]
    recorder, calls = layer._call._core, leaves(sparse_call(layer, x))
    assert isinstance(recorder, Recorder)
    launched: dict[str, list[tuple[object, ...]]] = {}
    for part, timed in calls.items():
        result = timed.call()
        launched[part] = list(recorder.calls)
        recorder.calls.clear()
        if part == "comparing the layer":
            assert result is False  # it is as it was
        if part == "allocations":
            assert isinstance(result, tuple) and [tensor.nbytes for tensor in result] == [5 * N * 2, recorder.workspace_bytes(5)]
    ((_, *about, x_address, workspace, output),) = launched["one entry for both"]
    assert (*about, x_address) == (7, 5, x.data_ptr())
    assert launched["selection"] == [("select", 7, 5, x_address, workspace)]
    assert launched["product"] == [("multiply", 7, 5, workspace, output)]
    around = ("nn.Module.__call__", "forward", "other checks")
    assert [[name for name, *_ in launched[part]] for part in around] == [["run"]] * 3
    assert launched.keys() == {*around, "one entry for both", "selection", "product", "comparing the layer", "allocations"}
    assert not launched["comparing the layer"] and not launched["allocations"]


def test_a_call_that_is_not_remembered_is_refused() -> None:
    layer = SparseLinear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16))
    with pytest.raises(InvalidArgumentError, match="bench host: argument `torch`"):
        sparse_call(layer, torch.randn(1, 5, K, dtype=torch.bfloat16))


@torch.no_grad()
def test_the_parts_of_a_dense_call_compute_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 5, K)
    few = SparseLinear.from_linear(nn.Linear(K, N), SparsityConfig(small_m="dense"))
    monkeypatch.setattr(few, "least_tokens", lambda device: 6)
    for layer in (nn.Linear(K, N), few):
        for timed in leaves(dense_call(layer, x)).values():
            assert torch.equal(timed.call(), nn.functional.linear(x, layer.weight, layer.bias))  # type: ignore[arg-type]


def test_no_more_calls_are_queued_than_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    queued = [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queued.append(0))

    def call() -> Tensor:
        assert not torch.is_grad_enabled()
        queued[-1] += 1
        return torch.empty(0)

    us = host._time(call, repeats=3)
    assert queued == [0, *[host._CALLS] * 4] and 0 < us < 1e6
    assert host._time(call, 1, 5) > 0 and queued[-2:] == [5, 5]


def test_the_command_shows_a_table_and_writes_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [HostTime("sparse", WHOLE, 12.345), HostTime("sparse", "one entry for both", -0.5), HostTime("sparse, compiled", WHOLE, 7.0)]
    monkeypatch.setattr("rtlynx.cli.bench.require_gpu", lambda: None)
    monkeypatch.setattr(host, "host_times", lambda rank, repeats: rows if (rank, repeats) == (32, 4) else [])
    monkeypatch.setattr(machine, "describe", lambda *about: list(about))
    monkeypatch.setattr(machine, "gpu_slug", lambda: "a-gpu")
    arguments = ["bench", "host", "--rank", "32", "--repeats", "4"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "one entry for both" in shown.output and "12.35" in shown.output and "wrote" not in shown.output
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--commit", "abc"]).exit_code == 0
    assert [path.name for path in tmp_path.rglob("*.*")] == ["host.csv"]
    lines = (tmp_path / "a-gpu" / "host.csv").read_text().splitlines()
    assert lines[:3] == ["# rtlynx bench host --rank 32 --repeats 4", "# abc", f"# {host.METHOD}"]
    assert [tuple(row.values()) for row in csv.DictReader(lines[3:])] == [
        ("sparse", "whole", "12.345"),
        ("sparse", "one entry for both", "-0.5"),
        ("sparse, compiled", "whole", "7"),
    ]
    assert lines[3] == "call,part,us"
