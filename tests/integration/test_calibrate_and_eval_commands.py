"""``rtlynx calibrate`` and ``rtlynx eval`` from end to end, what a seed decides, and how many steps the dense baseline has."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import rtlynx
from rtlynx import SparsityConfig
from rtlynx.cli import app
from rtlynx.evaluate import evaluate as module_function
from rtlynx.evaluate.sampling import Sampled, sample
from tiny_pipeline import PROMPTS, tiny_pipeline


def run(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, prompts for it, and the compensation that the command found with seed 0."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    assert f"wrote {folder / 'seed0.safetensors'}: split for 17 layers" in calibrate(folder, "seed0")
    return folder


def calibrate(folder: Path, name: str, seed: int = 0) -> str:
    where = "--prompts", folder / "prompts.txt", "--output", folder / f"{name}.safetensors"
    return run("calibrate", folder / "model", *where, "--steps", 2, "--rank", 16, "--device", "cpu", "--seed", seed)


def test_the_seed_decides(folder: Path) -> None:
    calibrate(folder, "again")
    calibrate(folder, "other", seed=1)
    first, again, other = (load_file(folder / f"{name}.safetensors") for name in ("seed0", "again", "other"))
    assert first and first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_the_command_found_lowers_the_error(folder: Path) -> None:
    def picture(pipe: Any) -> Tensor:
        return pipe(list(PROMPTS), num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt").images

    dense = picture(tiny_pipeline())
    naive = rtlynx.apply(tiny_pipeline(), SparsityConfig(rank=0, branch="none", norm_compensation=False))
    rtlynx.load_compensation(compensated := tiny_pipeline(), folder / "seed0.safetensors")
    assert 0 < (picture(compensated) - dense).norm() < 0.9 * (picture(naive) - dense).norm()


def test_eval_writes_its_report(folder: Path) -> None:
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")
    files = "--prompts", folder / "prompts.txt", "--compensation", folder / "seed0.safetensors", "--out", folder / "report"
    printed = run("eval", folder / "model", *files, "--steps", 3, "--fewer-steps", 2, "--device", "cpu")
    assert "eval.html" in printed and "dense, 2 of 3 steps" in " ".join(printed.split())
    with open(folder / "report" / "eval.csv", newline="") as file:
        figures = list(csv.DictReader(file))
    velocity = {row["name"]: float(row["value"]) for row in figures if row["figure"] == "velocity"}
    assert 0 < velocity["dense in bfloat16"] < velocity["sparse"]


def test_the_dense_baseline_takes_the_time_of_the_sparse_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense step of 4 s, a sparse one of 3 s: 8 sparse steps take as long as 6 dense ones."""
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")

    def timed(pipe: Any, *arguments: Any, steps: int, **others: Any) -> Sampled:
        a_step = 4.0 if all(layer.dense for layer in rtlynx.eligibility.sparse_layers(pipe.transformer).values()) else 3.0
        return replace(sample(pipe, *arguments, steps=steps, **others), seconds=a_step * steps)

    monkeypatch.setitem(module_function.__globals__, "sample", timed)
    pipe = rtlynx.apply(tiny_pipeline(), SparsityConfig(rank=16))
    ways = rtlynx.evaluate(pipe, list(PROMPTS), steps=8, batch_size=2, noise_floor=False, progress=False).ways
    assert [(way.name, way.seconds) for way in ways] == [("dense", 32.0), ("sparse", 24.0), ("dense, 6 of 8 steps", 24.0)]
