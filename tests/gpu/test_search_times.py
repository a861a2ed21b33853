"""What only a GPU can show of the search, the bench of quality and dense steps: times, and the whole way in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.bench.quality.layer_time import layers_ms
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.samples import Samples
from rtlynx.eligibility import sparse_layers
from rtlynx.search.options import Unit
from rtlynx.search.times import option_times
from tiny_models import TINY, output

pytest.importorskip("scipy", reason="the knapsack is SciPy's")

ALWAYS = SparsityConfig(small_m="sparse")


@pytest.mark.timed
def test_options_are_timed_each_with_its_own_compensation() -> None:
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
    assert bool((times[0] > times[1]).all())  # sixteen times the tokens
    assert all(layer.rank == 0 and not layer.dense for layer in layers.values())


@pytest.mark.timed
def test_the_bench_times_layers_that_share() -> None:
    layers = {name: SparseLinear.from_linear(nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16), ALWAYS) for name in "ab"}
    input = LayerInput(
        layers, Samples(torch.randn(100, 256, device="cuda", dtype=torch.bfloat16), torch.zeros(100, dtype=torch.int32)), 100
    )
    few, many = (layers_ms([input], tokens, repeats=5) for tokens in (1000, 64_000))
    assert few is not None and many is not None and 0 < few < many


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
