"""diffusers' caches, which reuse from step to step what changes little: on a sparse model they skip what they skip on a dense one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, hooks
from torch import Tensor, nn

import rtlynx
from more_pipelines import PIPELINES, draw
from rtlynx import SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.trajectory import Trajectory
from sparse_models import MODELS, sparse
from tiny_models import output, relative_error
from tiny_pipelines import flux_pipeline, sample, sample_guided, wan_pipeline

STEPS = 4
NOW = [900]
"""The timestep, which some caches ask for; they do nothing early on."""
CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: hooks.FirstBlockCacheConfig(threshold=0.5),
    "MagCache": lambda: hooks.MagCacheConfig(threshold=0.5, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "TaylorSeer": lambda: hooks.TaylorSeerCacheConfig(2, 1, taylor_factors_dtype=torch.float32),
    "TaylorSeer lite": lambda: hooks.TaylorSeerCacheConfig(2, 1, taylor_factors_dtype=torch.float32, use_lite_mode=True),
    "PyramidAttentionBroadcast": lambda: hooks.PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: NOW[0]),
    "FasterCache": lambda: hooks.FasterCacheConfig(
        is_guidance_distilled=True, attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: NOW[0]
    ),
    "SeaCache": lambda: hooks.SeaCacheConfig(threshold=0.5),
}
FAMILIES = ("flux", "qwen_image", "flux2", "wan", "hunyuan_video", "ltx")
"""The classes of the others have no `enable_cache` in diffusers."""
LEFT_OUT = {
    ("flux2", "FirstBlockCache"),  # fails in diffusers' dense model
    *(("wan", "TaylorSeer"), ("ltx", "TaylorSeer")),  # looks for names that attention has not there, so it does nothing
    *((family, "SeaCache") for family in FAMILIES if family != "wan"),  # does nothing: of these it knows Wan alone
}
CASES = [(family, cache) for family in FAMILIES for cache in CACHES if (family, cache) not in LEFT_OUT]


def steps(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], int]:
    """What every step predicts for what changes a little from step to step, and how many linear layers ran in all."""
    outputs, ran = [], 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    handles = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    for i in range(STEPS):
        NOW[0] = 900 if i == 0 else 500
        with model.cache_context("cond", step_index=i, sigma=1 - i / STEPS, num_inference_steps=STEPS):
            outputs.append(output(model, {**inputs, "hidden_states": (1 - 0.01 * i) * inputs["hidden_states"]}))
    for handle in handles:
        handle.remove()
    return outputs, ran


@pytest.mark.parametrize(("family", "cache"), CASES)
def test_caches_skip_what_they_skip_in_the_dense_model(family: str, cache: str) -> None:
    inputs = MODELS[family].inputs("cpu", torch.float32)
    dense, model = MODELS[family].build("cpu", torch.float32), sparse(family)
    without, ran_without = steps(model, inputs)
    for each in (dense, model):
        each.enable_cache(CACHES[cache]())
    want, ran = steps(dense, inputs)
    got, ran_sparse = steps(model, inputs)
    assert ran_sparse == ran < ran_without
    assert torch.equal(got[0], without[0])  # nothing to reuse yet
    assert any(not torch.equal(a, b) for a, b in zip(got, without, strict=True))
    assert all(relative_error(a, b) < 0.5 for a, b in zip(got, want, strict=True))
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(steps(model, inputs)[0], without, strict=True))
    for layer in sparse_layers(model).values():
        layer.dense = True
    model.enable_cache(CACHES[cache]())
    torch.testing.assert_close(steps(model, inputs)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # in diffusers
def test_faster_cache_halves_a_doubled_batch() -> None:
    def cache() -> Any:
        return hooks.FasterCacheConfig(
            unconditional_batch_skip_range=2, attention_weight_callback=lambda _: 0.5, current_timestep_callback=lambda: NOW[0]
        )

    def text_to_video() -> Any:
        """Of a picture's embedding, FasterCache would leave both halves."""
        config = {**MODELS["wan"].build("meta", torch.float32).config, "image_dim": None, "added_kv_proj_dim": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return WanTransformer3DModel.from_config(config).eval()

    inputs = MODELS["wan"].inputs("cpu", torch.float32)
    del inputs["encoder_hidden_states_image"]
    dense, model = text_to_video(), rtlynx.apply(text_to_video())
    without, ran_without = steps(model, inputs)
    batches: dict[Any, list[int]] = {dense: [], model: []}
    for each, seen in batches.items():
        each.enable_cache(cache())
        each.blocks[0].ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
    want, ran = steps(dense, inputs)
    got, ran_sparse = steps(model, inputs)
    assert batches[model] == batches[dense] == [2, 1, 2, 1]
    assert ran_sparse == ran < ran_without
    for i, each in enumerate(batches[model]):
        if each == 2:
            assert torch.equal(got[i], without[i])
        else:
            # Half the prediction is made up of what the halves differed by the step before: measured, 0.03.
            assert 1e-3 < relative_error(got[i], without[i]) < 0.1
        assert 1e-3 < relative_error(got[i], want[i]) < 0.1  # what selection drops of random weights and no branch: measured, 0.04
    for layer in sparse_layers(model).values():
        layer.dense = True
    model.disable_cache()
    model.enable_cache(cache())
    torch.testing.assert_close(steps(model, inputs)[0], want, rtol=1e-4, atol=1e-4)


def eight_steps(family: str) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    whole = PIPELINES[family]
    return whole.make, lambda pipe: draw(pipe, {**whole.arguments(), "num_inference_steps": 8})


RUNS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], float, int, int]] = {
    "flux": (flux_pipeline, lambda pipe: sample(pipe, num_inference_steps=8), 0.6, 8, 2 * 2),
    "wan": (wan_pipeline, lambda pipe: sample_guided(pipe, num_inference_steps=8), 0.25, 7, 7),
    "hunyuan_video": (*eight_steps("hunyuan_video"), 0.6, 4 + 8, 2 * 3),
    "ltx": (*eight_steps("ltx"), 0.25, 7, 7),
}
"""Family → its pipeline, eight steps of it, a threshold, and how often a call selects: up to the end of the first block, and after it."""


@pytest.mark.usefixtures("others_warnings_are_not_ours")
@pytest.mark.parametrize("family", RUNS)
def test_first_block_cache_skips_some_steps_of_a_run(family: str, selections: list[Tensor]) -> None:
    make, drawn, threshold, first, rest = RUNS[family]
    cache = hooks.FirstBlockCacheConfig(threshold=threshold)
    pipe, seen, starts = rtlynx.apply(make(), SparsityConfig(rank=16)), Trajectory(), []
    without = drawn(pipe)
    pipe.transformer.enable_cache(cache)
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: starts.append(len(selections)))
    with seen.recording(pipe.transformer):
        got = drawn(pipe)
    handle.remove()
    selected = [after - before for before, after in pairwise([*starts, len(selections)])]
    assert torch.equal(drawn(pipe), got)  # nothing is left over from the run before
    assert 1e-4 < relative_error(got, without) < 0.02  # measured, from 0.0008 to 0.007

    pipe.transformer.disable_cache()
    with torch.no_grad():
        whole = [torch.equal(pipe.transformer(**inputs)[0], answer) for _, inputs, answer in seen.calls]
    assert selected == [first + rest if each else first for each in whole]
    assert True in whole[whole.index(False) :]  # one that is skipped, and a later one that is not

    dense = make()
    for each in (dense, pipe):
        each.transformer.enable_cache(cache)
    for layer in sparse_layers(pipe.transformer).values():
        layer.dense = True
    torch.testing.assert_close(drawn(pipe), drawn(dense), rtol=1e-4, atol=1e-4)
