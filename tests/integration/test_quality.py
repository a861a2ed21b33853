"""`rtlynx bench quality` and `rtlynx.evaluate` end to end on a tiny untrained pipeline, and their parts on cases with a known answer."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import rtlynx
from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig
from rtlynx.adaln_shift import adaln_layers
from rtlynx.bench.quality import longer
from rtlynx.bench.quality.docs import BEGIN, END, draw_searches, write_docs
from rtlynx.bench.quality.judge import Judge
from rtlynx.bench.quality.layer_time import layer_calls, layers_ms
from rtlynx.bench.quality.pruning import pruned_weights
from rtlynx.bench.quality.results import COLUMNS, Results
from rtlynx.bench.quality.rows import Row, recipe_row, rows
from rtlynx.bench.quality.run import QualityBench, Settings
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Fit, Tensors, fit_input
from rtlynx.cli import app
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.drawing import draw
from rtlynx.demo.model import TOKENS
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS
from rtlynx.demo.scenes import random_scenes
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate import write_report
from rtlynx.evaluate.bootstrap import interval, mean_interval
from rtlynx.evaluate.likeness import psnr_db
from rtlynx.evaluate.trajectory import Trajectory
from rtlynx.recipe_file import read_recipe
from tiny_pipeline import PROMPTS, tiny_pipeline

SETTINGS = Settings(prompts=3, steps=3, batch=2, calibration_prompts=2, calibration_steps=2)


@pytest.fixture(scope="module")
def bench() -> QualityBench:
    return QualityBench(tiny_pipeline(), SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), SETTINGS, progress=False)


@pytest.fixture(scope="module")
def measured(bench: QualityBench) -> dict[str, dict[str, object]]:
    wanted = [
        Row("dense"),
        Row("dense_floor", other_precision=True),
        Row("fewer", steps=0.67),
        Row("wanda", pruning="wanda"),
        Row("naive", Fit("plain", 0, norm_compensation=False)),
        Row("split", Fit("split", 8, ("shift",))),
        Row("split_adaln", Fit("split", 8, ("shift",)), adaln=True),
        Row("split_fp8", Fit("split", 8, ("shift",)), precision="fp8"),
        Row("split", Fit("split", 8, ("shift",)), skip=True, reseeded=False),
        Row("joint", Fit("joint", 16, ("shift", "permutation"), bias=True)),
        Row("joint_bias4", Fit("joint", 16, ("shift", "permutation"), bias=4)),
        Row("split_last", Fit("split", 8, ("shift",)), dense_last=0.34),
        Row("split_rank16", Fit("split", 16, ("shift",))),
        Row("split16", Fit("split", 16, ("shift",)), skip=True),
        Row("split_weight", Fit("split", 8, ("shift",)), score="weight"),
        recipe_row("searched", SparsityConfig(include=("single_transformer_blocks.**",), rank=16, ranks={"**.proj_mlp": 0})),
    ]
    return {f"{row.method}{'_skip' if row.skip else ''}": bench.measure(row) for row in wanted}


def test_every_row_is_measured_and_ordered_as_it_must_be(measured: dict[str, dict[str, object]]) -> None:
    velocity = {name: row["velocity_rel_err"] and row["velocity_rel_err"][0] for name, row in measured.items()}  # type: ignore[index]
    assert velocity["dense"] == 0 and velocity["fewer"] is None
    assert 0 < velocity["dense_floor"] < velocity["joint"] < velocity["split"] < velocity["naive"]
    assert velocity["joint_bias4"] < velocity["split"]  # what groups add to one bias is not seen on random weights
    assert 0 < abs(velocity["split_fp8"] - velocity["split"]) < 0.2 * velocity["split"]
    assert max(velocity["split_skip"], velocity["split_last"], velocity["searched"]) < velocity["split"] and velocity["wanda"] > 0
    assert 0 < velocity["split_adaln"] != velocity["split"]
    assert measured["dense"]["psnr_db"] is None and measured["dense"]["frechet_minus_dense"] == (0, 0, 0)
    assert measured["joint"]["psnr_db"][0] > measured["naive"]["psnr_db"][0]  # type: ignore[index]
    assert len(measured["naive"]["layer_rel_err"]) == len(measured["split"]["layer_rel_err"]) == 12 + 5  # type: ignore[arg-type]
    assert measured["split_last"]["layer_rel_err"] == measured["split"]["layer_rel_err"]
    assert measured["split_last"]["velocity_by_step"][2] == 0 < measured["split"]["velocity_by_step"][2]  # type: ignore[index]
    dense = {name for name, error in measured["searched"]["layer_rel_err"].items() if error == 0}  # type: ignore[attr-defined]
    assert len(dense) == 12 and all(name.startswith("transformer_blocks") for name in dense)
    assert all(row["layer_ms"] is row["dense_layer_ms"] is None for row in measured.values())  # no GPU, no time
    json.dumps(measured)


def test_the_model_is_dense_and_unchanged_between_rows(bench: QualityBench, measured: dict[str, dict[str, object]]) -> None:
    again = bench.measure(Row("dense"))
    assert {**again, "seconds": 0, "fit_seconds": 0} == {**measured["dense"], "seconds": 0, "fit_seconds": 0}


ADALN = Row("split_adaln", Fit("split", 8, ("shift",)), adaln=True)


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


def test_rows_have_keys_of_their_own_and_every_method_has_one() -> None:
    every = rows(16, (8, 32), [recipe_row("mine", SparsityConfig(rank=16))])
    assert len({row.key for row in every}) == len(every)
    assert every[0] == Row("dense")
    methods = {row.method for row in every}
    assert {
        "dense_floor",
        "weights_magnitude",
        "weights_wanda",
        "naive",
        "norm",
        "paper_trained",
        "paper_trained_longer",
        "paper",
        "split",
        "refit",
        "joint",
        "split_fp8",
    } <= methods
    assert {row.rank for row in every if row.method == "split"} == {8, 16, 32}
    selections = {"magnitude", "shift", "permutation", "shift+permutation"}
    assert {row.selection for row in every if row.method == "joint"} == selections | {"weight", "weight+shift", "weight+shift+permutation"}


def test_a_longer_training_takes_the_best_rate_for_every_input(bench: QualityBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longer, "RATES", (1e-3, 1e-2))
    seen: dict[tuple[str, float], tuple[int, Tensor]] = {}  # layer and rate → steps, branch

    def fitted(input: LayerInput, fit: Fit, device: torch.device) -> dict[str, Tensors]:
        found = dict(fit_input(input, fit, device))
        seen.update({(name, fit.learning_rate): (fit.training_steps, tensors["comp_up"]) for name, tensors in found.items()})
        return found

    monkeypatch.setattr(longer, "fit_input", fitted)
    first, second = bench.inputs[:2]

    def errors(found: Mapping[str, Tensors]) -> dict[str, float]:
        """The lower rate is the better one for the first input, the higher for the second."""
        low = {name: torch.equal(tensors["comp_up"], seen[name, 1e-3][1]) for name, tensors in found.items()}
        return {name: float(low[name] is not (name in first.layers)) for name in found}

    found = longer.fit_longer([first, second], Fit("paper-trained", 16, training_steps=20), torch.device("cpu"), errors)
    assert {steps for steps, _ in seen.values()} == {40} and len(seen) == 2 * len(found)
    for name, tensors in found.items():
        assert tensors["comp_up"] is seen[name, 1e-3 if name in first.layers else 1e-2][1]


def test_a_longer_training_is_a_row(bench: QualityBench, measured: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "settings", replace(SETTINGS, training_steps=20))
    row = bench.measure(Row("paper_trained_longer", Fit("paper-trained", 16), longer=True))
    assert row["velocity_rel_err"][0] > 0
    assert len(row["layer_rel_err"]) == 17 and all(error > 0 for error in row["layer_rel_err"].values())


def test_what_says_most_is_measured_first() -> None:
    order = [row.key for row in rows(64, (16, 32), [recipe_row("mine", SparsityConfig(rank=64))])]
    claim = ["dense//0", "dense_floor//0", "dense_reseeded//0", "norm/magnitude/0", "paper_trained/magnitude/64", "split/magnitude/64"]
    assert [order.index(key) for key in claim] == sorted(order.index(key) for key in claim) and order.index(claim[-1]) < 10
    layers = ["norm_skip/magnitude/0", "paper_trained_skip/magnitude/64", "split_skip/shift/64", "searched/shift/64", "mine/shift/64"]
    assert max(order.index(key) for key in layers) < 21
    assert (
        max(map(order.index, layers)) < order.index("split/shift/16") < order.index("split_fp8/shift/64") < order.index("joint/weight/64")
    )
    assert sorted(order) == sorted(row.key for row in [*rows(64, (32, 16)), recipe_row("mine", SparsityConfig(rank=64))])
    assert {row.rank for row in rows(8, ()) if row.search} == {16}  # what configurations know


def test_a_searched_row_is_no_worse_than_the_paper_s_layers_at_equal_cost(
    bench: QualityBench, measured: dict[str, dict[str, object]]
) -> None:
    pytest.importorskip("scipy", reason="the knapsack is SciPy's")
    row, by_hand = bench.measure(Row("searched_work", Fit("split", 16, ("shift",)), search="work")), measured["split16_skip"]
    json.dumps(row)
    found, *others = row["search"]["points"]  # type: ignore[index]
    assert row["selection"] == "shift" and row["rank"] == by_hand["rank"] == 16
    assert found["time"] <= row["search"]["limit"] * (1 + 1e-9) and row["search"]["of_dense"] < 1  # type: ignore[index]
    paper = next(point for point in others if point["name"].startswith("paper"))
    assert paper["time"] == pytest.approx(row["search"]["limit"]) and found["measured"] <= paper["measured"]  # type: ignore[index]
    assert row["velocity_rel_err"][0] < 1.05 * by_hand["velocity_rel_err"][0]  # type: ignore[index] # on other prompts
    dense = {name for name, error in row["layer_rel_err"].items() if error == 0}  # type: ignore[attr-defined]
    config = SparsityConfig.from_dict(row["recipe"])  # type: ignore[arg-type]
    assert set(config.include or ()) == set(row["layer_rel_err"]) - dense  # type: ignore[call-overload]
    assert set(sparse_layers(rtlynx.apply(tiny_pipeline(), config).transformer)) == set(config.include or ())


def test_rows_that_fit_alike_fit_once(bench: QualityBench, measured: dict[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtlynx.bench.quality.run.fit_input", lambda *_: pytest.fail("fitted again"))
    again = bench.measure(Row("split_first", Fit("split", 8, ("shift",)), dense_first=0.34))
    assert again["layer_rel_err"] == measured["split"]["layer_rel_err"]
    assert measured["split_weight"]["layer_rel_err"] != measured["split"]["layer_rel_err"]


def test_several_processes_add_to_one_file(measured: dict[str, dict[str, object]], tmp_path: Path) -> None:
    one, other = (Results(tmp_path, "tiny", {"prompts": 3}) for _ in range(2))
    for results, name in ((one, "naive"), (other, "dense"), (one, "split"), (other, "naive")):
        results.add(name, measured[name], [])
    assert set(Results(tmp_path, "tiny", {"prompts": 3}).rows) == {"naive", "dense", "split"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for part in ("0/2", "3/2", "half"):
        assert CliRunner().invoke(app, ["bench", "quality", "--part", part, "--device", "cpu", "--out", str(tmp_path)]).exit_code == 2


def test_a_model_that_was_trained_again_is_not_mixed_with_the_one_before(measured: dict[str, Any], tmp_path: Path) -> None:
    before, now, other = {"prompts": 3}, {"prompts": 3, "fingerprint": "a"}, {"prompts": 3, "fingerprint": "b"}
    Results(tmp_path, "new", now).add("dense", measured["dense"], [])
    Results(tmp_path, "new", now).add("naive", measured["naive"], [])
    for settings, changed in ((other, "another fingerprint"), (before, "another fingerprint")):
        with pytest.raises(InvalidArgumentError, match=changed):
            Results(tmp_path, "new", settings)
    Results(tmp_path, "old", before).add("dense", measured["dense"], [])  # a file of before fingerprints
    Results(tmp_path, "old", now).add("naive", measured["naive"], [])
    stored = json.loads((tmp_path / "quality-old.json").read_text())
    assert stored["settings"] == before and list(stored["rows"]) == ["dense", "naive"]
    with pytest.raises(InvalidArgumentError, match="another prompts"):
        Results(tmp_path, "old", {**now, "prompts": 4})


def test_every_run_that_added_rows_is_named(measured: dict[str, dict[str, object]], tmp_path: Path) -> None:
    for name, commit in (("naive", "aaa"), ("split", "bbb"), ("dense", "bbb")):
        Results(tmp_path, "tiny", {"prompts": 3}).add(name, measured[name], ["gpu: none", f"commit {commit}"])
    assert (tmp_path / "quality.csv").read_text().splitlines()[:4] == ["# model: tiny", "# gpu: none", "# commit aaa", "# commit bbb"]


def test_a_row_like_the_dense_one_is_kept_without_a_difference_in_psnr(measured: dict[str, Any], tmp_path: Path) -> None:
    results = Results(tmp_path, "tiny", {"prompts": 3})
    infinite = {**measured["naive"]["replicates"], "psnr_db": [math.inf] * len(measured["naive"]["replicates"]["psnr_db"])}
    results.add("split", measured["split"], [])
    results.add("equal", {**measured["naive"], "method": "equal", "replicates": infinite}, [])  # a search may leave everything dense
    paired = list(csv.DictReader((tmp_path / "quality_paired.csv").read_text().splitlines()[1:]))
    found = {row["figure"] for row in paired if row["method"] == "equal"}
    assert "velocity_rel_err" in found and "psnr_db" not in found


def test_results_are_written_after_every_row_and_taken_up_again(measured: dict[str, dict[str, object]], tmp_path: Path) -> None:
    results = Results(tmp_path, "tiny", {"prompts": 3})
    for name, row in measured.items():
        results.add(name, row, ["gpu: none"])
    lines = (tmp_path / "quality.csv").read_text().splitlines()
    assert lines[:2] == ["# model: tiny", "# gpu: none"]
    table = list(csv.DictReader(lines[2:]))
    assert tuple(table[0]) == COLUMNS
    assert sorted(row["method"] for row in table) == sorted(row["method"] for row in measured.values())
    selections = [row["selection"] for row in table]
    assert len(list(groupby(selections))) == len(set(selections))  # rows of one selection together
    assert table[0]["velocity_rel_err"] == "0" and table[0]["psnr_db"] == "" and float(table[4]["psnr_db"]) > 0
    intervals = list(csv.DictReader((tmp_path / "quality_intervals.csv").read_text().splitlines()[2:]))
    assert all(float(row["low"]) <= float(row["high"]) for row in intervals) and "dense_layer_ms" not in {x["figure"] for x in intervals}
    paired = list(csv.DictReader((tmp_path / "quality_paired.csv").read_text().splitlines()[2:]))
    found = {(row["method"], row["figure"]): row for row in paired if row["against"] == "split/shift/8" and row["rank"] != "16"}
    assert float(found["naive", "velocity_rel_err"]["low"]) > 0 and float(found["naive", "psnr_db"]["high"]) < 0
    gained = measured["naive"]["velocity_rel_err"][0] - measured["split"]["velocity_rel_err"][0]  # type: ignore[index]
    assert float(found["naive", "velocity_rel_err"]["value"]) == pytest.approx(gained, rel=1e-3)
    assert ("dense", "psnr_db") not in found and ("fewer", "velocity_rel_err") not in found and ("fewer", "frechet") in found
    layers = list(csv.DictReader((tmp_path / "quality_layers.csv").read_text().splitlines()[2:]))
    assert {row["layer"] for row in layers} >= {"transformer_blocks.*.attn.to_q", "single_transformer_blocks.*.proj_out"}
    assert Results(tmp_path, "tiny", {"prompts": 3}).rows.keys() == results.rows.keys()
    with pytest.raises(InvalidArgumentError, match="another prompts"):
        Results(tmp_path, "tiny", {"prompts": 4})
    page = tmp_path / "quality.md"
    page.write_text(f"# Quality\n\n{BEGIN}\nstale\n{END}\nThe end.\n")
    with_time = {**measured["naive"], "layer_ms": 3.0, "psnr_db": (math.inf, 40.0, math.inf)}  # a picture may be identical
    Results(tmp_path, "tiny", {"prompts": 3}).add("naive", with_time, ["gpu: none"])
    for _ in range(2):  # again, it changes nothing
        assert CliRunner().invoke(app, ["bench", "quality-docs", str(tmp_path), "--page", str(page)]).exit_code == 0
        text = page.read_text()
        assert "stale" not in text and text.endswith(f"{END}\nThe end.\n") and "- gpu: none" in text
        assert text.count("\n| naive | magnitude | 0 |") == 3 and "| 3.00 |" in text  # figures, differences, layers
        assert "\n| naive | magnitude | 0 | **+" in text
    Results(tmp_path, "tiny", {"prompts": 3}).add("naive", {**with_time, "dense_layer_ms": 2.0}, ["gpu: none"])
    Results(tmp_path, "tiny", {"prompts": 3}).add("dense", {**measured["dense"], "layer_ms": 2.4, "dense_layer_ms": 2.4}, ["gpu: none"])
    before = {key: value for key, value in measured["split"].items() if key != "dense_layer_ms"}
    Results(tmp_path, "tiny", {"prompts": 3}).add("split", {**before, "layer_ms": 3.0}, ["gpu: none"])  # as older rows are
    write_docs([tmp_path], page)
    of_dense = {line.split(" | ")[0]: line.split(" | ")[-1] for line in page.read_text().splitlines() if "%) |" in line}
    assert of_dense == {"| dense": "2.40 (100%) |", "| naive": "3.00 (150%) |", "| split": "3.00 (125%) |"}
    other = tmp_path / "another-gpu"
    Results(other, "tiny", {"prompts": 3}).add("naive", {**with_time, "frechet_minus_dense": (12.34, -1.0, 25.0)}, ["gpu: another"])
    assert CliRunner().invoke(app, ["bench", "quality-docs", str(tmp_path), str(other), "--page", str(page)]).exit_code == 0
    text = page.read_text()
    titles = [f"### tiny, {tmp_path.name}\n", "- gpu: none", "### tiny, another-gpu\n", "- gpu: another", "| +12.3 (-1.0 to 25.0) |"]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert f"`rtlynx bench quality-docs {tmp_path} {other}`" in text
    page.write_text("no marks")
    with pytest.raises(InvalidArgumentError, match="begin"):
        write_docs([tmp_path], page)
    Results(tmp_path, "other", {"prompts": 3}).add("dense", measured["dense"], [])
    text = (tmp_path / "quality.csv").read_text()
    assert "\nother,dense," in text and "\ntiny,dense," in text


def test_searches_by_time_are_drawn(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    points = [{"name": name, "time": 2.0 * share, "share": share, "predicted": 0.1, "measured": 0.2} for name, share in (("found", 0.8),)]
    for method, times in (("searched", "measured on a GPU"), ("searched_work", "counted as work, in TFLOP")):
        row = {**measured["split"], "method": method, "search": {"times": times, "points": points}}
        Results(tmp_path, "tiny", {}).add(method, row, [])
    assert draw_searches(tmp_path) == [tmp_path / "pareto-tiny-searched.svg"]
    assert (tmp_path / "pareto-tiny-searched.svg").read_text().lstrip().startswith("<?xml")


def test_the_command_goes_on_past_a_row_that_fails_and_measures_it_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="the knapsack is SciPy's")
    model, out = tmp_path / "mine" / "pipeline", tmp_path / "results"
    tiny_pipeline().save_pretrained(model)
    SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME).save(model / FILE_NAME)
    sizes = {
        "--prompts": 3,
        "--steps": 2,
        "--calibration-prompts": 2,
        "--rank": 16,
        "--ranks": "",
        "--only": "naive/magnitude,searched,searched_work",
    }
    arguments = ["bench", "quality", "--model", str(model), "--out", str(out), "--device", "cpu"]
    arguments += [str(part) for pair in sizes.items() for part in pair]
    measure, broken = QualityBench.measure, ["naive"]

    def fragile(bench: QualityBench, row: Row) -> dict[str, object]:
        if row.method in broken:
            raise ValueError("out of luck")
        return measure(bench, row)

    monkeypatch.setattr(QualityBench, "measure", fragile)
    first = CliRunner().invoke(app, arguments)
    assert isinstance(first.exception, RuntimeError) and "1 rows failed: naive/magnitude/0" in str(first.exception)
    stored = json.loads((out / "cpu" / "quality-mine.json").read_text())["rows"]
    assert list(stored) == ["dense//0", "searched_work/shift/16"]  # no times to search by without a GPU
    recipe = out / "cpu" / "recipe-mine-searched_work.json"
    assert read_recipe(recipe) == SparsityConfig.from_dict(stored["searched_work/shift/16"]["recipe"])
    broken.clear()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    again = tiny_pipeline()
    with torch.no_grad():
        next(iter(sparse_layers(rtlynx.apply(again).transformer).values())).weight.mul_(2)
    rtlynx.remove(again).save_pretrained(tmp_path / "again" / "mine" / "pipeline")
    SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME).save(tmp_path / "again" / "mine" / "pipeline" / FILE_NAME)
    retrained = CliRunner().invoke(app, [*arguments, "--model", str(tmp_path / "again" / "mine" / "pipeline")])
    assert retrained.exit_code == 2 and "fingerprint" in retrained.output
    rows = json.loads((out / "cpu" / "quality-mine.json").read_text())["rows"]
    assert set(rows) == {*stored, "naive/magnitude/0"} and rows["searched_work/shift/16"] == stored["searched_work/shift/16"]


def test_pruned_weights_are_two_of_four_and_come_back(bench: QualityBench) -> None:
    layer = next(iter(bench.layers.values()))
    before = layer.weight.detach().clone()
    kept = []
    for by_activation in (False, True):
        with pruned_weights(bench.inputs, by_activation) as originals:
            assert torch.equal(originals[layer], before)
            kept.append(layer.weight.detach() != 0)
            assert (kept[-1].unflatten(1, (-1, 4)).sum(-1) == 2).all()
            assert torch.equal(layer.weight[kept[-1]], before[kept[-1]])
        assert torch.equal(layer.weight, before) and not originals
    assert not torch.equal(*kept)


def test_layers_with_pruned_weights_are_held_to_the_unpruned_ones(bench: QualityBench) -> None:
    by_magnitude, by_wanda = (bench.measure(Row(f"weights_{kind}", pruning=kind))["layer_rel_err"] for kind in ("magnitude", "wanda"))
    assert len(by_magnitude) == len(by_wanda) == 17
    assert all(0 < error < 1 for error in (*by_magnitude.values(), *by_wanda.values()))
    assert sum(by_wanda.values()) < sum(by_magnitude.values())
    assert set(bench._layer_errors().values()) == {0.0}  # as they were


def test_the_judge_knows_drawings_and_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(300, generator)
    drawn = draw(scenes, generator) / 2 + 0.5
    judge = Judge(SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), scenes)
    real, grey = judge.look(drawn), judge.look(torch.full_like(drawn, 0.5))
    assert real.right.sum() / real.asked.sum() > 0.98 > 0.5 > grey.right.sum() / grey.asked.sum()
    assert 0 < judge.frechet(real.features) < 0.1 * judge.frechet(grey.features)


# ---- evaluate ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation() -> rtlynx.Evaluation:
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")
    pipe = rtlynx.apply(tiny_pipeline(), SparsityConfig(rank=16))
    return rtlynx.evaluate(pipe, list(PROMPTS), steps=4, batch_size=2, fewer_steps=2, progress=False)


def test_ways_are_compared_with_the_dense_one(evaluation: rtlynx.Evaluation) -> None:
    dense, sparse, floor, fewer = evaluation.ways
    assert [way.name for way in evaluation.ways] == ["dense", "sparse", "dense in bfloat16", "dense, 2 of 4 steps"]
    assert dense.velocity is None and fewer.velocity is None
    assert sparse.velocity is not None and floor.velocity is not None
    assert 0 < floor.velocity.value < 0.2 * sparse.velocity.value
    assert sparse.velocity.low <= sparse.velocity.value <= sparse.velocity.high
    assert list(sparse.velocity_by_step) == [0, 1, 2, 3]
    assert floor.psnr_db.value > sparse.psnr_db.value and 0 < sparse.ssim.value < floor.ssim.value <= 1  # type: ignore[union-attr]
    assert len(evaluation.layer_errors) == 17 and all(0 < error < 1 for error in evaluation.layer_errors.values())


def test_the_report_is_complete(evaluation: rtlynx.Evaluation, tmp_path: Path) -> None:
    files = write_report(evaluation, tmp_path / "report", {"model": "tiny"})
    assert sorted(path.name for path in files) == ["eval.csv", "eval.html", "eval_layers.csv", "eval_steps.csv"]
    page = files[0].read_text()
    assert page.count("<img ") >= 4 * 2 and "http" not in page
    figures = list(csv.DictReader((tmp_path / "report" / "eval.csv").read_text().splitlines()))
    assert {row["figure"] for row in figures} == {"velocity", "psnr_db", "ssim", "seconds"}


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="without sparse layers"):
        rtlynx.evaluate(tiny_pipeline(), PROMPTS)
    pipe = rtlynx.apply(tiny_pipeline())
    with pytest.raises(InvalidArgumentError, match="one sparse transformer at a time"):
        two = SimpleNamespace(transformer=pipe.transformer, transformer_2=rtlynx.apply(tiny_pipeline()).transformer)
        rtlynx.evaluate(two, PROMPTS)
    for arguments, piece in (({"prompts": []}, "at least one"), ({"prompts": PROMPTS, "metrics": ["magic"]}, "magic")):
        with pytest.raises(InvalidArgumentError, match=piece):
            rtlynx.evaluate(pipe, **arguments)  # type: ignore[arg-type]


def test_a_trajectory_finds_a_model_that_says_a_tenth_more() -> None:
    class Model(nn.Module):
        factor = 1.0

        def forward(self, hidden_states: Tensor, scale: Tensor) -> tuple[Tensor]:
            return (self.factor * scale * hidden_states,)

    model, trajectory, scale = Model(), Trajectory(), torch.tensor(2.0)
    latents = torch.ones(3, 5)
    with trajectory.recording(model, lambda call: call != 1, per_run=3):
        for _ in range(2 * 3):
            model(hidden_states=latents, scale=scale)
            latents += 1  # in place, as some schedulers do
    assert trajectory.steps == [0, 2]
    assert trajectory.errors(model).relative() == 0
    model.factor = 1.1
    errors = trajectory.errors(model)
    assert errors.squared.shape == (2, 6)
    assert errors.relative() == pytest.approx(0.1) and errors.by_step() == pytest.approx([0.1, 0.1])
    assert len({id(inputs["scale"]) for _, inputs, _ in trajectory.calls}) == 2  # copied once a run, not once a call


def test_errors_of_rows_with_guidance_are_those_of_their_prompts() -> None:
    """Runs of two prompts and of one, two pictures a prompt, guidance in the first of two steps: without prompts first, then with."""
    rows = [[1, 2, 3, 4, 10, 20, 30, 40], [1, 1, 1, 1], [5, 6, 50, 60], [1, 1]]
    trajectory = Trajectory(
        [(step, {"of": torch.tensor(of)}, torch.zeros(len(of), 1)) for step, of in zip((0, 4, 0, 4), rows, strict=True)]
    )

    class Model(nn.Module):
        def forward(self, of: Tensor) -> Tensor:
            return of.sqrt().unsqueeze(1)

    errors = trajectory.errors(Model(), batches=[2, 1], pictures=2)
    want = [[1 + 2 + 10 + 20, 3 + 4 + 30 + 40, 5 + 6 + 50 + 60], [2, 2, 2]]
    torch.testing.assert_close(errors.squared, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0)
    assert errors.steps == [0, 4] and not errors.size.any()


def test_intervals_cover_the_mean_and_are_paired() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = mean_interval(values)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / math.sqrt(200), rel=0.25)
    assert mean_interval(values + 1).low == pytest.approx(found.low + 1)
    assert interval(lambda chosen: 3.0, 5, resamples=0) == (3.0, 3.0, 3.0)


def test_psnr() -> None:
    reference = torch.full((2, 3, 8, 8), 0.5)
    assert psnr_db(reference + 0.1, reference).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr_db(reference, reference).tolist() == [math.inf] * 2


def test_the_commands_refuse_in_words(tmp_path: Path) -> None:
    for arguments, piece in (
        (["bench", "quality", "--model", str(tmp_path), "--device", "cpu"], FILE_NAME),
        (["bench", "quality", "--only", "magic", "--device", "cpu", "--out", str(tmp_path)], "magic"),
        (["calibrate", "somewhere/model", "-o", str(tmp_path / "a.safetensors")], "one prompt a line"),
        (["eval", "somewhere/model"], "one prompt a line"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and piece in result.output, result.output
