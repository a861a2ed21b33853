"""The demo end to end on a tiny untrained pipeline, and what it measures on cases with a known answer."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from rich.console import Console

import rtlynx
from rtlynx.demo import run as demo
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.measure import VelocityProbe, psnr_db, sample
from rtlynx.demo.methods import SENSITIVE_LAYERS, methods
from rtlynx.demo.model import PRESETS, build_transformer
from rtlynx.demo.pipeline import ScenesPipeline
from rtlynx.demo.place import choose_place
from rtlynx.demo.run import DemoResult, Settings, run_demo
from rtlynx.demo.show import print_result, write_result
from rtlynx.errors import InvalidArgumentError

PROMPTS = (
    "a red circle at the top left on yellow stripes",
    "a blue star at the centre on plain cyan",
    "a green ring at the centre on red dots",
)


@pytest.fixture(scope="module")
def pipe() -> ScenesPipeline:
    transformer = build_transformer(PRESETS["tiny"]).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if not parameter.any():  # a fresh model starts as the identity and predicts zero: give it something to say
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    pipe = ScenesPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe: ScenesPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    SceneClassifier().save(folder / FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> DemoResult:
    place = replace(choose_place("cpu"), calibration_prompts=4, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "choose_place", lambda wanted: place)
        patch.setattr(demo, "CALIBRATION_STEPS", 2)
        return run_demo(Settings(prompts=3, steps=2, model=folder), progress=False)


def test_every_method_is_measured(result: DemoResult) -> None:
    dense, *sparse = result.outcomes
    assert [outcome.method.name for outcome in result.outcomes] == ["dense", "naive", "norm", "paper", "split", "split-skip"]
    assert (dense.velocity_rel_err, dense.psnr_db, dense.sparse_flops_share) == (0, None, 0)
    for outcome in sparse:
        assert outcome.pictures.shape == (3, 3, 64, 64)
        assert 0 < outcome.velocity_rel_err < 1
        assert outcome.psnr_db is not None and math.isfinite(outcome.psnr_db)
        assert 0 <= outcome.attribute_accuracy <= 1
        assert outcome.step_ms is not None and outcome.step_ms > 0
        assert 0.3 < outcome.sparse_flops_share < 1


def test_a_branch_helps_and_so_do_skipped_layers(result: DemoResult) -> None:
    error = {outcome.method.name: outcome.velocity_rel_err for outcome in result.outcomes}
    share = {outcome.method.name: outcome.sparse_flops_share for outcome in result.outcomes}
    assert error["split"] < error["norm"]
    assert error["split-skip"] < error["split"]
    assert share["split-skip"] < share["split"] == share["norm"]


def test_what_ran_is_told(result: DemoResult, tmp_path: Path) -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    print_result(result, [tmp_path / "demo.png"], console)
    text = console.export_text()
    assert "CPU reference" in text
    assert "3 prompts, 2 steps" in text
    assert all(outcome.method.title in text for outcome in result.outcomes)


def test_three_files_are_written(result: DemoResult, tmp_path: Path) -> None:
    files = write_result(result, tmp_path / "new folder")
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["demo.html", "demo.json", "demo.png"]
    rows = json.loads(files[2].read_text(), parse_constant=pytest.fail)
    keys = ["method", "velocity_rel_err", "psnr_db", "attribute_accuracy", "step_ms", "sparse_flops_share"]
    assert [list(row) for row in rows] == [keys] * 6
    assert rows[0]["psnr_db"] is None and rows[1]["psnr_db"] > 0
    page = files[1].read_text()
    assert page.count("<img ") == 6 * 3
    assert "http" not in page
    with Image.open(files[0]) as grid:
        assert grid.width > 3 * 128 and grid.height > 6 * 128


def test_the_first_prompts_do_not_depend_on_their_number() -> None:
    place = choose_place("cpu")
    few, _ = demo._scenes(Settings(prompts=2), place)
    many, calibration = demo._scenes(Settings(prompts=5), place)
    assert torch.equal(few.position, many[:2].position) and torch.equal(few.colour, many[:2].colour)
    assert len(calibration) == place.calibration_prompts


def test_pictures_do_not_depend_on_the_batch(pipe: ScenesPipeline) -> None:
    together = sample(pipe, PROMPTS, steps=3, seed=5, batch=3).pictures
    alone = sample(pipe, PROMPTS, steps=3, seed=5, batch=1).pictures
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    other = sample(pipe, PROMPTS, steps=3, seed=6, batch=3).pictures
    assert not torch.allclose(together, other, atol=0.1)


def test_one_step_is_all_warm_up(pipe: ScenesPipeline) -> None:
    assert sample(pipe, PROMPTS, steps=1, seed=0, batch=3).step_ms is None


def test_velocity_error_of_a_model_that_says_a_tenth_more(pipe: ScenesPipeline) -> None:
    with VelocityProbe(pipe.transformer, steps=4) as probe:
        sample(pipe, PROMPTS, steps=4, seed=0, batch=2)
    assert probe.error() == pytest.approx(0, abs=1e-6)
    output = pipe.transformer.proj_out
    with torch.no_grad():
        before = [parameter.clone() for parameter in output.parameters()]
        for parameter in output.parameters():
            parameter.mul_(1.1)
        assert probe.error() == pytest.approx(0.1, rel=1e-3)
        for parameter, value in zip(output.parameters(), before, strict=True):
            parameter.copy_(value)


def test_psnr_of_a_known_difference() -> None:
    reference = torch.zeros(2, 3, 8, 8)
    assert psnr_db(reference + 0.2, reference) == pytest.approx(20, abs=1e-4)  # a tenth of the range everywhere
    assert psnr_db(reference, reference) == math.inf


def test_skip_patterns_name_layers_of_the_shipped_model() -> None:
    model = build_transformer(PRESETS["small"])
    for pattern in SENSITIVE_LAYERS:
        rtlynx.apply(model, rtlynx.SparsityConfig(skip=(pattern,)))
        assert any(row.reason == f"skipped by the pattern {pattern!r}" for row in rtlynx.summary(model)), pattern


def test_sparse_layers_are_sparse_whatever_is_faster() -> None:
    configs = {method.name: method.config for method in methods(16)}
    assert configs.pop("dense") is None
    assert all(config is not None and config.small_m == "sparse" for config in configs.values())


def test_methods_have_names_of_their_own() -> None:
    names = [method.name for method in methods(16)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("prompts", [0, 1025])
def test_too_few_or_too_many_prompts_are_refused(folder: Path, prompts: int) -> None:
    with pytest.raises(InvalidArgumentError, match="1 to 1024"):
        run_demo(Settings(device="cpu", prompts=prompts, model=folder), progress=False)
