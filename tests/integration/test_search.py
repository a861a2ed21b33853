"""`rtlynx.search` on a tiny pipeline with times from a made-up table: what it chooses, saves, and leaves the model as."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rtlynx
from rtlynx import InvalidArgumentError, SparseLinear, SparsityConfig
from rtlynx.bench.results import write_csv
from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Fit
from rtlynx.calibrate.samples import Samples
from rtlynx.calibrate.workfolder import WorkFolder
from rtlynx.cli import app
from rtlynx.demo.captions import caption
from rtlynx.demo.pipeline import ScenesPipeline
from rtlynx.demo.scenes import random_scenes
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.trajectory import Trajectory
from rtlynx.layer_times import LayerTimes
from rtlynx.recipe_file import read_recipe
from rtlynx.search import Search, plot_pareto
from rtlynx.search.effects import Effects
from rtlynx.search.knapsack import exchanges, solve
from rtlynx.search.options import Unit, chosen, fit_units
from rtlynx.search.times import WORK, _measured, _tokens, option_times
from tiny_models import TINY
from tiny_pipeline import PROMPTS, tiny_pipeline

pytest.importorskip("scipy", reason="the knapsack is SciPy's")

CONFIG = SparsityConfig(small_m="sparse")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse takes 0.6 of dense without a branch."""
    path = tmp_path_factory.mktemp("bench") / "layer.csv"
    shapes = [(n, k, n * k * 1e-5) for n in (64, 256) for k in (64, 256)]
    rows = [LayerTimes(512, n, k, 0, ms, 0.5 * ms, 0.1 * ms, 0.6 * ms, 1, 1) for n, k, ms in shapes]
    write_csv(path, ["gpu: imagined"], rows)
    return path


@pytest.fixture(scope="module")
def found(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ScenesPipeline, Search, Path]:
    pipe, recipe = tiny_pipeline(), tmp_path_factory.mktemp("search") / "recipe.json"
    prompts = caption(random_scenes(8, torch.Generator().manual_seed(0)))
    options = {"ranks": (0, 16, 32), "times": table, "output": recipe, "batch_size": 2, "progress": False, "num_inference_steps": 4}
    return pipe, rtlynx.search(pipe, prompts, budget=0.8, config=CONFIG, **options), recipe  # type: ignore[arg-type]


def test_the_budget_is_kept_and_nothing_measured_within_it_is_better(found: tuple[ScenesPipeline, Search, Path]) -> None:
    _, search, _ = found
    best, *others = search.points
    assert best.name == "found" and 0 < best.share <= 0.8 + 1e-9 and search.times_from == "estimated from imagined's table"
    assert {"all dense", "all sparse", "all sparse, rank 32"} <= {point.name for point in others}
    assert all(best.measured <= point.measured for point in others if point.share <= best.share)
    dense = next(point for point in others if point.name == "all dense")
    assert dense.share == 1 and dense.measured == dense.predicted == 0
    sparse = next(point for point in others if point.name == "all sparse")
    assert best.measured < sparse.measured and 0.5 < sparse.predicted / sparse.measured < 2  # probes tell the size of an error


def test_the_recipe_rebuilds_what_the_model_is_now(found: tuple[ScenesPipeline, Search, Path], tmp_path: Path) -> None:
    pipe, search, recipe = found
    layers = sparse_layers(pipe.transformer)
    assert tuple(layers) and set(layers) == set(search.config.include or ())
    assert all(layer.rank == search.config.rank_of(name) for name, layer in layers.items())
    assert not any(layer.dense for layer in layers.values())
    assert read_recipe(recipe) == search.config
    assert json.loads(recipe.read_text())["made_with"]["points"][0]["name"] == "found"
    other = rtlynx.apply(tiny_pipeline(), recipe)
    assert set(sparse_layers(other.transformer)) == set(layers)
    search.compensation.save(tmp_path / "found.safetensors")
    rtlynx.load_compensation(other, tmp_path / "found.safetensors")
    pictures = [p(list(PROMPTS), num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images for p in (pipe, other)]
    assert torch.equal(*pictures)
    again = rtlynx.calibrate(rtlynx.apply(tiny_pipeline(), recipe), list(PROMPTS), num_inference_steps=2, progress=False)
    assert {name: tensor.shape for name, tensor in again.tensors.items() if "comp_up" in name} == {
        name: tensor.shape for name, tensor in search.compensation.tensors.items() if "comp_up" in name
    }


def test_the_picture_is_drawn(found: tuple[ScenesPipeline, Search, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is matplotlib's")
    plot_pareto(found[1].points, tmp_path / "pareto.svg", "tiny")
    assert (tmp_path / "pareto.svg").read_text().count("<path") > 10


def test_an_interrupted_search_goes_on_where_it_was(
    found: tuple[ScenesPipeline, Search, Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, saves, runs = tmp_path / "recipe.json", [0], [0]
    save, sample = WorkFolder.save, ScenesPipeline.__call__

    def interrupted(folder: WorkFolder, solved: Mapping[str, Any]) -> None:
        saves[0] += 1
        if saves[0] == 3:
            raise KeyboardInterrupt
        save(folder, solved)

    def counting(pipe: ScenesPipeline, *args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        return sample(pipe, *args, **kwargs)

    def search(**changed: Any) -> Search:
        prompts = caption(random_scenes(8, torch.Generator().manual_seed(0)))
        options = {"ranks": (0, 16, 32), "times": table, "output": recipe, "batch_size": 2, "progress": False, "num_inference_steps": 4}
        return rtlynx.search(tiny_pipeline(), prompts, config=CONFIG, **{"budget": 0.8, **options, **changed})  # type: ignore[arg-type]

    monkeypatch.setattr(WorkFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search()
    assert not recipe.exists() and len(list(tmp_path.glob("recipe.json.work/*.safetensors"))) == 2
    with pytest.raises(InvalidArgumentError, match=r"search: argument `output`: got .* of a run with other settings"):
        search(ranks=(0, 16))
    monkeypatch.setattr(ScenesPipeline, "__call__", counting)
    again = search()
    assert [file.name for file in tmp_path.iterdir()] == [recipe.name]
    assert again.config == found[1].config and again.points == found[1].points
    assert again.compensation.tensors.keys() == found[1].compensation.tensors.keys()
    assert all(torch.equal(tensor, again.compensation.tensors[name]) for name, tensor in found[1].compensation.tensors.items())
    monkeypatch.setattr(WorkFolder, "remove", lambda folder: None)  # as if it had ended before its files were removed
    search()
    runs[0] = 0
    search()
    assert runs[0] == 2  # held-out ones: one to count calls, one to keep some


def test_probes_find_the_error_that_reaches_the_output() -> None:
    """Of two layers in a row: what an option of the first does to the output is known exactly."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 8, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.second(self.first(hidden_states)),)

    model = rtlynx.apply(Model(), SparsityConfig(include=("first",), rank=0, branch="none", small_m="sparse"))
    units = [Unit(sparse_layers(model), {0: {"first": {}}})]
    units[0].choose(None)
    trajectory, inputs = Trajectory(), torch.randn(6, 20, 64)
    with trajectory.recording(model), torch.no_grad():
        model(hidden_states=inputs)
    effects = Effects(units, (None, 0))
    for _ in effects.measure(model, trajectory, probes=300, seed=0):
        pass
    with chosen(units, [0]):
        want = trajectory.errors(model).relative() ** 2
    assert effects.single[0].tolist() == pytest.approx([0, want], rel=0.1)
    assert effects.rows == [120] and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("factor, named", [(0.0, "sum to 0.0"), (float("nan"), "sum to nan")])
def test_probes_refuse_outputs_that_say_nothing(factor: float, named: str) -> None:
    trajectory = Trajectory([(0, {}, torch.full((2, 3), factor))])
    with pytest.raises(InvalidArgumentError, match=named):
        next(Effects([], (None,)).measure(nn.Identity(), trajectory, probes=1, seed=0))


def test_probes_refuse_gradients_that_are_not_finite() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return ((self.first(hidden_states) * 0).sqrt() + 1,)  # its gradient is 0 · ∞

    model = rtlynx.apply(Model(), SparsityConfig(include=("first",), rank=0, branch="none", small_m="sparse"))
    units = [Unit(sparse_layers(model), {0: {"first": {}}})]
    units[0].choose(None)
    trajectory = Trajectory()
    with trajectory.recording(model), torch.no_grad():
        model(hidden_states=torch.randn(2, 20, 64))
    with pytest.raises(InvalidArgumentError, match="not finite"):
        next(Effects(units, (None, 0)).measure(model, trajectory, probes=1, seed=0))


def test_the_knapsack_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, times = (torch.rand(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    every = [list(choice) for choice in product(range(3), repeat=5)]

    def total(t: torch.Tensor, choice: list[int]) -> float:
        return float(t[torch.arange(5), torch.tensor(choice)].sum())

    for budget in (1.2, 1.8, 2.5):
        allowed = [choice for choice in every if total(times, choice) <= budget]
        assert solve(errors, times, budget) == min(allowed, key=lambda choice: total(errors, choice))
    with pytest.raises(InvalidArgumentError, match="fastest"):
        solve(errors, times, 0.1)

    start = solve(errors, times, 1.8)
    near = exchanges(start, errors, times, 1.8, 1000)
    want = [c for c in every if total(times, c) <= 1.8 and 0 < sum(a != b for a, b in zip(c, start, strict=True)) <= 2]
    assert sorted(near) == sorted(want)
    assert [total(errors, c) for c in near] == pytest.approx(sorted(total(errors, c) for c in near))


def test_work_is_counted() -> None:
    layers = {name: SparseLinear(64, n) for name, n in (("q", 64), ("k", 128))}
    found, _ = option_times([Unit(layers, {})], [None, 0, 16], [100], CONFIG, WORK)
    per_output = torch.tensor([64, 32, 32 + 16])
    assert found[0].tolist() == pytest.approx((2e-10 * (192 * per_output + torch.tensor([0, 0, 64 * 16]))).tolist())


def test_times_are_measured_on_tokens_that_the_layers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [SparseLinear(64, 64) for _ in range(3)]
    read = [torch.randn(1000, 64) for _ in range(2)]
    inputs = [
        LayerInput({f"{i}": layer}, Samples(x, torch.zeros(1000, dtype=torch.int32)), 1000)
        for i, (layer, x) in enumerate(zip(layers, read, strict=False))
    ]
    units = [unit for units in fit_units(inputs, Fit("split", 16), [0, 16], torch.device("cpu")) for unit in units]
    for unit, x in zip(units, read, strict=True):
        assert unit.tokens is not None and torch.equal(unit.tokens, x[::4])
    few, many = _tokens(units, 100), _tokens(units, 1200)
    both = torch.cat([x[::4] for x in read])
    assert torch.equal(few, both[:500:5]) and torch.equal(many, torch.cat([both, both, both])[:1200])
    assert _tokens([Unit({"2": layers[2]}, {})], 100).shape == (100, 64)
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        sys.modules[option_times.__module__], "time_interleaved", lambda calls, **_: seen.update(calls) or {name: 1.0 for name in calls}
    )
    assert _measured(units, [None, 0, 16], 100, CONFIG) == [1.0] * 3
    with torch.no_grad():
        for call in seen.values():
            call()  # type: ignore[operator]


def test_calls_by_position_and_lists_of_samples() -> None:
    model, inputs = TINY["z_image"].build("cpu", torch.float32), TINY["z_image"].inputs("cpu", torch.float32)
    given = [inputs["x"], inputs["t"], inputs["cap_feats"]]  # as its pipeline does

    def run() -> torch.Tensor:
        return model(*given, return_dict=False)[0]  # type: ignore[no-any-return]

    trajectory = Trajectory()
    with trajectory.recording(model), torch.no_grad():
        run()
    ((_, recorded, _),) = trajectory.calls
    assert list(recorded) == ["x", "t", "cap_feats", "return_dict"]
    assert torch.equal(recorded["x"][0], inputs["x"][0]) and recorded["x"][0] is not inputs["x"][0]
    assert trajectory.errors(model).relative() == 0
    found = rtlynx.search(model, run=run, budget=0.8, config=CONFIG, ranks=(0, 16), times="work", refine=1, progress=False)
    assert found.points[0].share <= 0.8 + 1e-9 and 0 < trajectory.errors(model).relative() < 1


def test_layers_that_saw_little_or_nothing_are_named(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.scale = nn.Linear(64, 64), nn.Linear(64, 64), 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.used(x)

    model, x = Model(), torch.randn(20, 64)
    config = SparsityConfig(include=("**",), small_m="sparse")
    with caplog.at_level("WARNING", "rtlynx"):
        found = rtlynx.search(model, run=lambda: model(x), budget=0.9, config=config, ranks=(0, 16), times=table, refine=0, progress=False)
    assert "search: 1 layers saw fewer than 2 tokens per channel, first used" in caplog.text
    assert "search: unused was never called; it stays dense" in caplog.text and found.config.include in ((), ("used",))
    with pytest.raises(InvalidArgumentError, match="search: argument `input of used`: got NaN or infinity"):
        rtlynx.search(model, run=lambda: model(x / 0), budget=0.9, config=config, ranks=(0, 16), times=table, refine=0, progress=False)


def test_what_cannot_be_searched_is_refused(tmp_path: Path, table: Path) -> None:
    pipe = tiny_pipeline()
    for arguments, piece in (
        ({"budget": 0.0}, "budget"),
        ({"budget": 0.9, "method": "refit"}, "one with a branch"),
        ({"budget": 0.9, "ranks": ()}, "at least one"),
        ({"budget": 0.9, "prompts": PROMPTS[:1]}, "at least two"),
        ({"budget": 0.9}, "layer.csv"),
        ({"budget": 0.1, "times": table}, "fastest"),
        ({"budget": 0.9, "times": table, "config": SparsityConfig(precision="fp8")}, "a table without gemm_e4m3_ms"),
    ):
        with pytest.raises(InvalidArgumentError, match=piece):
            rtlynx.search(pipe, **{"prompts": PROMPTS, "progress": False, "ranks": (16,), "num_inference_steps": 1, **arguments})  # type: ignore[arg-type]
    two, other = tiny_pipeline(), TINY["qwen_image"].build("cpu", torch.float32)
    two.transformer_2 = tiny_pipeline().transformer
    with pytest.raises(InvalidArgumentError, match="a pipeline with two transformers, expected one transformer at a time"):
        rtlynx.search(two, PROMPTS, budget=0.9, progress=False)
    with pytest.raises(InvalidArgumentError, match="the qwen-image recipe has no list of layers, expected a share"):
        rtlynx.search(other, run=lambda: None, budget="paper")
    assert not sparse_layers(two.transformer_2) and not sparse_layers(other)  # before anything was touched
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="rtlynx-recipe"):
        rtlynx.apply(pipe, tmp_path / "other.json")


def test_the_command(table: Path, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    paths = {"--output": "r.json", "--compensation": "c.safetensors"}  # and captions of the demo's world for prompts
    files = [part for option, name in paths.items() for part in (option, str(tmp_path / name))]
    numbers = [
        "--count",
        "4",
        "--ranks",
        "16",
        "--steps",
        "2",
        "--refine",
        "1",
        "--budget",
        "paper",
        "--times",
        str(table),
        "--adaln-shift",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, ["search", str(tmp_path / "model"), *files, *numbers])
    assert result.exit_code == 0, result.output
    assert "found" in result.output and (tmp_path / "r.svg").is_file()
    assert rtlynx.Compensation.load(tmp_path / "c.safetensors").config == read_recipe(tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json").adaln_shift
