"""Dense steps: every model's clock is read right, and dense steps are exactly the dense model's."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rtlynx
from rtlynx import InvalidArgumentError, SparsityConfig
from rtlynx.dense_steps import is_dense
from rtlynx.dense_steps import noise_level as level_of
from rtlynx.eligibility import sparse_layers
from rtlynx.recipes import find_recipe
from tiny_families import FAMILIES, WITHOUT_RECIPE
from tiny_models import NEIGHBOURS, TINY, output

CONFIG = SparsityConfig(rank=0, branch="none", small_m="sparse", dense_first=0.2, dense_last=0.1)
MODELS = {**TINY, **NEIGHBOURS, "hidream": FAMILIES["hidream"]}  # whose argument has a name of its own


def inputs_at(name: str, model: nn.Module, noise_level: float) -> dict[str, Any]:
    """The tiny model's inputs at a noise level."""
    clock, inputs = find_recipe(model).clock, MODELS[name].inputs("cpu", torch.float32)
    time = inputs[clock.argument]
    return {**inputs, clock.argument: torch.full_like(time.float(), clock.picture + noise_level * (clock.noise - clock.picture))}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_first_and_last_steps_are_the_dense_models_and_others_sparse(name: str) -> None:
    model = MODELS[name].build("cpu", torch.float32)
    levels = (1.0, 0.85, 0.7, 0.2, 0.05)
    dense = [output(model, inputs_at(name, model, level)) for level in levels]
    rtlynx.apply(model, CONFIG)
    same = [torch.equal(output(model, inputs_at(name, model, level)), want) for level, want in zip(levels, dense, strict=True)]
    assert same == [True, True, False, False, True]
    rtlynx.apply(model, SparsityConfig(rank=0, branch="none", small_m="sparse"))
    assert not torch.equal(output(model, inputs_at(name, model, 1.0)), dense[0])
    rtlynx.remove(rtlynx.apply(model, CONFIG))
    assert torch.equal(output(model, inputs_at(name, model, 0.7)), dense[2]) and not model._forward_pre_hooks


def test_a_clock_that_nobody_knows_is_said_to_be_taken_for_the_usual_one(caplog: pytest.LogCaptureFixture) -> None:
    for model, said in ((WITHOUT_RECIPE["cogview4"], 1), (TINY["flux"], 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rtlynx"):
            rtlynx.apply(model.build("cpu", torch.float32), CONFIG)
        assert caplog.text.count("taken to go from 1000 (noise) to 0 (picture)") == said


def test_as_many_steps_as_the_share_says_also_in_bfloat16() -> None:
    for steps in (10, 20, 28, 50):
        for dtype in (torch.float32, torch.bfloat16):
            levels = (1 - torch.arange(steps) / steps).to(dtype)
            first, last = (sum(is_dense(float(level), *shares) for level in levels) for shares in ((0.2, 0.0), (0.0, 0.1)))
            assert (first, last) == (-(-steps // 5), steps // 10)
    assert not any(is_dense(level, 0.0, 0.0) for level in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_and_an_interrupted_run_keep_no_foreign_state(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), CONFIG)
    output(model, inputs_at("flux", model, 1.0))
    copied = copy_of(model)
    output(copied, inputs_at("flux", copied, 0.5))
    states = [{layer.dense_step for layer in sparse_layers(each).values()} for each in (model, copied)]
    assert states == [{True}, {False}]
    rtlynx.apply(model, CONFIG)  # again
    assert len(model._forward_pre_hooks) == 1 and not any(layer.dense_step for layer in sparse_layers(model).values())


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_have_two_versions_and_no_more(whole: bool) -> None:
    torch._dynamo.reset()
    model = TINY["flux"].build("cpu", torch.float32)
    dense = output(model, inputs_at("flux", model, 0.95))
    rtlynx.apply(model, CONFIG)
    sparse = output(model, inputs_at("flux", model, 0.5))
    if whole:
        model.compile(backend="eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")  # type: ignore[operator]
    torch.testing.assert_close(output(model, inputs_at("flux", model, 0.5)), sparse)
    torch.testing.assert_close(output(model, inputs_at("flux", model, 0.95)), dense)
    counters.clear()
    for level in (0.45, 0.9, 0.3, 0.99, 0.02, 0.6):
        output(model, inputs_at("flux", model, level))
    torch.testing.assert_close(output(model, inputs_at("flux", model, 0.95)), dense)
    assert counters["stats"]["unique_graphs"] == 0


def test_tokens_with_times_of_their_own_count_by_the_noisiest() -> None:
    model = NEIGHBOURS["wan"].build("cpu", torch.float32)
    times = torch.tensor([[0.0, 0.0, 700.0]])
    assert level_of(model, (), {"timestep": times}) == pytest.approx(0.7)
    assert level_of(model, (), {"timestep": times.to("meta")}) is None
    flipped = TINY["z_image"].build("cpu", torch.float32)
    assert level_of(flipped, (None, torch.tensor([1.0, 0.25])), {}) == pytest.approx(0.75)


def test_a_model_that_is_not_told_the_time_is_refused() -> None:
    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x)  # type: ignore[no-any-return]

    model = Timeless()
    with pytest.raises(InvalidArgumentError, match="'timestep'"):
        rtlynx.apply(model, SparsityConfig(include=("to_q",), dense_last=0.1))
    assert type(model.to_q) is nn.Linear


def test_calibration_sees_only_the_steps_that_will_be_sparse() -> None:
    model = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), SparsityConfig(rank=16, small_m="sparse", dense_first=0.2))
    seen: list[float] = []

    def run() -> None:
        for level in (1.0, 0.5):
            seen.append(level)
            output(model, inputs_at("flux", model, level))

    rtlynx.calibrate(model, run=run, progress=False)
    found = rtlynx.Compensation.from_model(model).tensors
    rtlynx.calibrate(model, run=lambda: output(model, inputs_at("flux", model, 0.5)), progress=False)
    alone = rtlynx.Compensation.from_model(model).tensors
    name = "single_transformer_blocks.0.proj_out.comp_up"
    torch.testing.assert_close(found[name], alone[name])
