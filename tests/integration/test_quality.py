"""`rtlynx bench quality` end to end on a tiny untrained pipeline: its rows, and the files they go to."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import rtlynx
from rtlynx import InvalidArgumentError, SparsityConfig
from rtlynx.bench.quality import longer
from rtlynx.bench.quality.docs import BEGIN, END, draw_searches, write_docs
from rtlynx.bench.quality.judge import Judge
from rtlynx.bench.quality.pruning import pruned_weights
from rtlynx.bench.quality.results import COLUMNS, Results
from rtlynx.bench.quality.rows import Row, recipe_row, rows
from rtlynx.bench.quality.run import QualityBench
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Fit, Tensors, fit_input
from rtlynx.cli import app
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.drawing import draw
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS
from rtlynx.demo.scenes import random_scenes
from rtlynx.eligibility import sparse_layers
from rtlynx.recipe_file import read_recipe
from tiny_pipeline import tiny_pipeline
from tiny_quality import SETTINGS, tiny_bench


@pytest.fixture(scope="module")
def bench() -> QualityBench:
    return tiny_bench()


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


def test_the_commands_refuse_in_words(tmp_path: Path) -> None:
    for arguments, piece in (
        (["bench", "quality", "--model", str(tmp_path), "--device", "cpu"], FILE_NAME),
        (["bench", "quality", "--only", "magic", "--device", "cpu", "--out", str(tmp_path)], "magic"),
        (["calibrate", "somewhere/model", "-o", str(tmp_path / "a.safetensors")], "one prompt a line"),
        (["eval", "somewhere/model"], "one prompt a line"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and piece in result.output, result.output
