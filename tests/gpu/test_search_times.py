"""What only a GPU can show of the search, the bench of quality and dense steps: times, and the whole way in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rtlynx
from rtlynx import SparseLinear, SparsityConfig, timing
from rtlynx.bench.quality.layer_time import layers_ms
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.samples import Samples
from rtlynx.eligibility import sparse_layers
from rtlynx.search.options import Unit
from rtlynx.search.times import option_times
from tiny_models import TINY, output

pytest.importorskip("scipy", reason="the knapsack is SciPy's")

ALWAYS = SparsityConfig(small_m="sparse")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Of every call of a sparse layer: the tokens, and the rank, None where it ran dense. Nothing is compared by the clock."""
    seen: list[tuple[int, int | None]] = []
    forward = SparseLinear.forward

    def recorded(self: SparseLinear, input: Tensor) -> Tensor:
        seen.append((len(input), None if self.dense else self.rank))
        return forward(self, input)

    monkeypatch.setattr(SparseLinear, "forward", recorded)
    return seen


def test_options_run_each_with_its_own_tokens_and_compensation(calls: list[tuple[int, int | None]]) -> None:
    layers = {
        name: SparseLinear.from_linear(nn.Linear(1024, n, device="cuda", dtype=torch.bfloat16), ALWAYS)
        for name, n in (("q", 1024), ("k", 4096))
    }
    branch = torch.randn(1024, 64)
    fitted = {
        0: {"q": {}, "k": {}},
        64: {name: {"comp_down": branch, "comp_up": torch.randn(len(layers[name].weight), 64)} for name in layers},
    }
    unit = Unit(layers, fitted)
    times, source = option_times([unit, unit], [None, 0, 64], [4096, 256], ALWAYS, None)
    assert times.shape == (2, 3) and bool((times > 0).all()) and source == f"measured on {torch.cuda.get_device_name()}"
    assert set(calls) == {(rows, option) for rows in (4096, 256) for option in (None, 0, 64)}
    assert all(layer.rank == 0 and not layer.dense for layer in layers.values())


def test_the_bench_runs_layers_that_share_on_their_share_of_tokens(
    calls: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_MOST_FLUSHES", 1)  # a call that a busy host prepared late is not made again
    layers = {name: SparseLinear.from_linear(nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16), ALWAYS) for name in "abc"}

    def read_by(names: str, seen: int) -> LayerInput:
        x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)
        return LayerInput({name: layers[name] for name in names}, Samples(x, torch.zeros(100, dtype=torch.int32)), seen)

    taken = layers_ms([read_by("ab", 100), read_by("c", 25)], 1000, repeats=1)
    assert taken is not None and min(taken) > 0
    assert calls.count((1000, 0)) == 2 * calls.count((250, 0)) > 0 and set(calls) == {(1000, 0), (250, 0)}


def test_a_search_in_half_precision() -> None:
    tiny = TINY["flux"]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):  # the others' backward passes are not deterministic, of which torch warns
        found = rtlynx.search(
            model, run=lambda: output(model, inputs), budget=0.8, config=ALWAYS, ranks=(0, 16), times="work", refine=2, progress=False
        )
    assert found.points[0].share <= 0.8 + 1e-9 and 0 < found.points[0].measured < 1
    assert set(sparse_layers(model)) == set(found.config.include or ())
    assert output(model, inputs).isfinite().all()


def test_dense_steps_read_the_clock_on_the_device() -> None:
    tiny = TINY["flux"]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    inputs = {**inputs, "timestep": torch.full_like(inputs["timestep"], 0.95)}
    want = output(model, inputs)
    rtlynx.apply(model, SparsityConfig(small_m="sparse", dense_first=0.1, fuse=False))  # fused blocks round in other places
    assert torch.equal(output(model, inputs), want)
    assert not torch.equal(output(model, {**inputs, "timestep": inputs["timestep"] / 2}), want)
