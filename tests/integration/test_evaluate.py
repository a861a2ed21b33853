"""`rtlynx.evaluate` on a tiny untrained pipeline, and its parts on cases with a known answer."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import rtlynx
from rtlynx import InvalidArgumentError, SparsityConfig
from rtlynx.evaluate import write_report
from rtlynx.evaluate.bootstrap import interval, mean_interval
from rtlynx.evaluate.likeness import psnr_db
from rtlynx.evaluate.trajectory import Trajectory
from tiny_pipeline import PROMPTS, tiny_pipeline


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
