"""The layer times of `rtlynx bench quality`: what is timed, and against what."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rtlynx import SparseLinear
from rtlynx.adaln_shift import adaln_layers
from rtlynx.bench.quality.layer_time import layer_calls, layers_ms
from rtlynx.bench.quality.rows import Row
from rtlynx.bench.quality.run import QualityBench
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Fit
from rtlynx.demo.model import TOKENS
from tiny_quality import SETTINGS, tiny_bench

ADALN = Row("split_adaln", Fit("split", 8, ("shift",)), adaln=True)


@pytest.fixture(scope="module")
def bench() -> QualityBench:
    return tiny_bench()


def test_layers_that_adaln_feeds_are_timed_with_what_is_done_around_them(bench: QualityBench) -> None:
    samples, rows = 3, 3 * 5 + 1
    with bench._as(ADALN), torch.no_grad(), ExitStack() as hooks, ExitStack() as watchers:
        seen: dict[SparseLinear, tuple[Tensor, Tensor]] = {}
        for layer in bench.layers.values():
            handle = layer.register_forward_hook(lambda layer, args, output: seen.update({layer: (args[0], output)}))
            hooks.callback(handle.remove)
            # A layer whose input is watched is given what it selects from; else its selection takes the shift away itself.
            watchers.callback(layer.register_forward_pre_hook(lambda *_: None).remove)
        fed = adaln_layers(bench.pipe.transformer)
        watched: dict[SparseLinear, Tensor] = {}
        for input in bench._samples_of(True)[0]:
            call, _ = layer_calls(input, rows, samples)
            call()
            watched |= {layer: seen[layer][1] for layer in input.layers.values()}
            first = {layer: seen[layer] for layer in input.layers.values()}
            assert len({id(left) for left, _ in first.values()}) == 1  # q, k and v read one tensor
            for name, layer in input.layers.items():
                left, output = first[layer]
                added = output - layer.forward(left)
                if name not in fed:
                    assert left.shape == (rows, layer.in_features) and not added.any()
                    continue
                assert left.shape == (samples, 5, layer.in_features)
                torch.testing.assert_close(left.flatten(0, 1), input.samples.x[: samples * 5], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-4)
                assert added.abs().amax(-1).min() > 1e-3
            call()
            assert all(torch.equal(seen[layer][1], output) for layer, (_, output) in first.items())
            assert all((seen[layer][0] is first[layer][0]) == (name not in fed) for name, layer in input.layers.items())
        watchers.close()
        for input in bench._samples_of(True)[0]:
            layer_calls(input, rows, samples)[0]()
            for layer in input.layers.values():
                torch.testing.assert_close(seen[layer][1], watched[layer], rtol=1e-4, atol=1e-4)
    assert len(fed) == 8 + 4


def test_times_are_of_what_the_layers_of_a_row_read(bench: QualityBench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("rtlynx.bench.quality.run.layers_ms", lambda *arguments: asked.append(arguments) or (3.0, 4.0))
    for row in (bench.measure(Row("dense")), bench.measure(ADALN)):
        assert (row["layer_ms"], row["dense_layer_ms"]) == (3.0, 4.0)
    wanda = bench.measure(Row("wanda", pruning="wanda"))
    assert wanda["layer_ms"] is wanda["dense_layer_ms"] is None
    sizes, left = (SETTINGS.batch * TOKENS, SETTINGS.batch), bench._samples_of(True)[0]
    assert asked == [(bench.inputs, *sizes), (left, *sizes)] and bench.inputs is not left


@pytest.mark.parametrize(
    ("row", "ms"),
    [
        (Row("fewer", steps=0.67), 3.0 * 2 / 3),  # 2 of 3 steps
        (Row("split_first", Fit("split", 8, ("shift",)), dense_first=0.3), 3.0 * 1 / 3 + 2.0 * 2 / 3),
        (Row("split_last", Fit("split", 8, ("shift",)), dense_last=0.34), 3.0 * 1 / 3 + 2.0 * 2 / 3),
    ],
)
def test_times_are_means_over_the_steps(bench: QualityBench, row: Row, ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtlynx.bench.quality.run.layers_ms", lambda *_: (3.0 if row.fit is None else 2.0, 3.0))
    assert bench._layer_ms(row) == (pytest.approx(ms), 3.0)


class _OnGpu(Tensor):
    """Of the CPU, but says otherwise: what is timed can then be looked at without a GPU."""

    device = torch.device("cuda")


def _timed(inputs: list[LayerInput], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], tuple[float, float]]:
    """What `layers_ms` has timed, by name, and what it makes of 1, 2, 4, … ms for these."""
    functions: dict[str, Any] = {}

    def timed(given: Mapping[str, Any], *_: object, **__: object) -> dict[str, float]:
        functions.update(given)
        return {name: 2.0**i for i, name in enumerate(given)}

    monkeypatch.setattr("rtlynx.bench.quality.layer_time.time_interleaved", timed)
    on_gpu = [replace(input, samples=SimpleNamespace(x=input.samples.x.as_subclass(_OnGpu))) for input in inputs]  # type: ignore[arg-type]
    taken = layers_ms(on_gpu, 6, 2)
    assert taken is not None
    return functions, taken


@pytest.mark.parametrize(
    ("row", "dense"),
    [
        (Row("dense"), 17),
        (Row("split", Fit("split", 8, ("shift",))), 0),
        (Row("split", Fit("split", 8, ("shift",)), skip=True), None),
        (ADALN, 0),
    ],
)
def test_dense_layers_take_turns_with_those_of_a_row(
    bench: QualityBench, row: Row, dense: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench._as(row):
        inputs = bench._samples_of(row.adaln)[0]
        functions, taken = _timed(inputs, monkeypatch)
        already = [input for input in inputs if all(layer.dense for layer in input.layers.values())]
        assert dense is None or sum(len(input.layers) for input in already) == dense
        names = {f"{input.name}{kind}" for input in inputs for kind in ("", ", dense") if not kind or input not in already}
        assert functions.keys() == names
        times = {name: 2.0**i for i, name in enumerate(functions)}
        assert taken == (sum(times[i.name] for i in inputs), sum(times.get(f"{i.name}, dense", times[i.name]) for i in inputs))
        products: list[tuple[int, Tensor]] = []
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda x, weight, bias: products.append((x.shape[-1], weight)) or linear(x, weight, bias))
        for input in inputs:
            if input not in already:
                products.clear()
                functions[f"{input.name}, dense"]()
                assert [weight for _, weight in products] == [layer.weight for layer in input.layers.values()]  # and nothing else
