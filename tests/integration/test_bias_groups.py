"""A bias per group of timesteps: exact where the error's mean depends on the timestep, in every form a model runs and travels in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rtlynx
from rtlynx import Compensation, CompensationMismatchError, InvalidArgumentError, SparsityConfig
from rtlynx.bias_groups import group_of
from rtlynx.calibrate import METHODS
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.layers import layer_errors
from tiny_models import TINY, output, relative_error
from tiny_pipeline import PROMPTS, tiny_pipeline

K, N = 64, 96
LEVELS = (0.95, 0.8, 0.55, 0.3, 0.1)


class Timed(nn.Module):
    """One layer, told the time as the generic recipe's models are: 1000 for noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(K, N)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def constant(group: int) -> Tensor:
    """One token for all of a group's steps: whatever its selection loses is lost at every token, so a bias can restore all of it."""
    return torch.randn(1, K, generator=torch.Generator().manual_seed(group))


def calibrated(model: nn.Module, inputs: Any, **options: Any) -> Compensation:
    def run() -> None:
        for level in LEVELS:
            output(model, inputs(level))

    return rtlynx.calibrate(model, run=run, progress=False, **options)


def call(model: nn.Module, level: float, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(x, torch.full((2,), 1000 * level))
    return answer


def group_at(level: float) -> int:
    return int(group_of(torch.tensor(level), 4))


def test_groups_are_equal_parts_of_the_way_from_noise_to_picture() -> None:
    assert [group_at(level) for level in (1.0, 0.76, 0.74, 0.5, 0.49, 0.25, 0.2, 0.0)] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert group_of(torch.tensor([1.2, -0.1]), 4).tolist() == [0, 3]  # a schedule may start above its clock's noise


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"paper-trained"}))
@pytest.mark.parametrize("selection", [(), ("shift", "permutation")])
def test_what_depends_on_the_timestep_alone_is_restored_exactly(method: str, selection: tuple[str, ...]) -> None:
    model = Timed()
    dense = {level: call(model, level, constant(group_at(level))) for level in LEVELS}
    rtlynx.apply(model, SparsityConfig(include=("layer",), rank=16, small_m="sparse"))

    def run() -> None:
        for level in LEVELS:
            call(model, level, constant(group_at(level)).repeat(300, 1))

    errors = {}
    for bias in (1, 4):
        rtlynx.calibrate(model, run=run, method=method, selection=selection, bias=bias, progress=False)
        errors[bias] = [relative_error(call(model, level, constant(group_at(level))), dense[level]) for level in LEVELS]
    assert model.layer.comp_bias.shape == (4, N)  # type: ignore[union-attr]
    assert max(errors[4]) < 1e-5, errors
    if not selection and method == "plain":  # nothing else can tell the steps apart
        assert min(errors[1]) > 1e-3, errors


def test_a_group_without_calibration_steps_takes_the_nearest_ones_bias(caplog: pytest.LogCaptureFixture) -> None:
    model = rtlynx.apply(Timed(), SparsityConfig(include=("layer",), rank=16))
    rtlynx.calibrate(
        model, run=lambda: [call(model, level, constant(i).repeat(99, 1)) for i, level in enumerate((0.9, 0.1))], bias=4, progress=False
    )
    assert "calibrate: groups of timesteps: no recipe says how Timed is told the time" in caplog.text
    first, second, third, last = model.layer.comp_bias  # type: ignore[misc]
    assert torch.equal(first, second) and torch.equal(third, last) and not torch.equal(first, last)


# ---- a model ----------------------------------------------------------------------------------------------------------------------------


def flux_inputs(level: float) -> dict[str, Any]:
    return {**TINY["flux"].inputs("cpu", torch.float32), "timestep": torch.full((2,), level)}


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Compensation]:
    model = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), SparsityConfig(rank=16, small_m="sparse"))
    return model, calibrated(model, flux_inputs, bias=4, selection=("shift",))


def outputs(model: nn.Module) -> Tensor:
    return torch.stack([output(model, flux_inputs(level)) for level in LEVELS])


def test_every_step_reads_its_groups_row(fitted: tuple[nn.Module, Compensation]) -> None:
    model, compensation = fitted
    biases = {name: tensor for name, tensor in compensation.tensors.items() if name.endswith(".comp_bias")}
    assert len(biases) == TINY["flux"].sparse_layers and {tensor.dim() for tensor in biases.values()} == {2}
    for level in LEVELS:
        got = output(model, flux_inputs(level))
        single = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), SparsityConfig(rank=16, small_m="sparse"))
        own = {name: tensor[group_at(level)] if name in biases else tensor for name, tensor in compensation.tensors.items()}
        Compensation(own, compensation.config, compensation.layers).apply_to(single)
        assert torch.equal(got, output(single, flux_inputs(level)))
        assert not any(layer.bias_groups > 1 for layer in sparse_layers(single).values()) and not single._forward_pre_hooks


def test_it_travels_in_the_file_and_in_state_dicts(fitted: tuple[nn.Module, Compensation], tmp_path: Path) -> None:
    model, compensation = fitted
    want = outputs(model)
    compensation.save(tmp_path / "groups.safetensors")
    loaded = TINY["flux"].build("cpu", torch.float32)
    Compensation.load(tmp_path / "groups.safetensors").apply_to(loaded)
    assert torch.equal(outputs(loaded), want)
    again = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), SparsityConfig(rank=16, small_m="sparse"))
    for _ in range(2):  # into layers without, and with a compensation
        again.load_state_dict(model.state_dict())
        assert torch.equal(outputs(again), want)
    assert not any("bias_group" in key for key in model.state_dict())
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    copied = copy.deepcopy(model)
    output(model, flux_inputs(0.9))
    assert torch.equal(outputs(copied), want)
    groups = {id(layer.bias_group) for layer in sparse_layers(copied).values()}
    assert len(groups) == 1 and groups.isdisjoint({id(layer.bias_group) for layer in sparse_layers(model).values()})


def test_a_saved_model_loads_with_its_groups(fitted: tuple[nn.Module, Compensation], tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    compensation = fitted[1]
    model = FluxTransformer2DModel.from_config(TINY["flux"].build("cpu", torch.float32).config)
    model.load_state_dict(TINY["flux"].build("cpu", torch.float32).state_dict())
    model.save_pretrained(tmp_path / "dense")
    loaded = FluxTransformer2DModel.from_pretrained(
        tmp_path / "dense", quantization_config=rtlynx.RTLynxConfig(SparsityConfig(rank=16, small_m="sparse"))
    )
    compensation.apply_to(loaded)
    want = outputs(loaded)
    loaded.save_pretrained(tmp_path / "sparse")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "sparse")
    assert torch.equal(outputs(again), want)


def test_files_that_do_not_fit_are_refused_before_anything_changes(fitted: tuple[nn.Module, Compensation], tmp_path: Path) -> None:
    compensation = fitted[1]
    compensation.save(tmp_path / "good.safetensors")
    tensors = load_file(tmp_path / "good.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "good.safetensors", framework="pt") as file:
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith(".comp_bias"))
    save_file({**tensors, name: tensors[name][None]}, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(CompensationMismatchError, match=r"comp_bias has shape \(1, 4, "):
        Compensation.load(tmp_path / "bad.safetensors")
    model = rtlynx.apply(Timed(), SparsityConfig(include=("layer",), rank=16))
    with pytest.raises(InvalidArgumentError, match="comp_bias"):
        model.layer.set_compensation(comp_bias=torch.zeros(4, N + 1))  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="comp_bias"):
        model.load_state_dict({**model.state_dict(), "layer.comp_bias": torch.zeros(4, N + 1)})


def test_the_bias_of_a_shift_follows_changed_weights_in_every_group(fitted: tuple[nn.Module, Compensation]) -> None:
    model = copy.deepcopy(fitted[0])
    layer = next(iter(sparse_layers(model).values()))
    before = layer.comp_bias.clone()  # type: ignore[union-attr]
    change = torch.randn_like(layer.weight) / 10
    with torch.no_grad():
        layer.weight += change
    rtlynx.refresh(model)
    torch.testing.assert_close(layer.comp_bias - before, (change @ layer.shift).expand(4, -1))


def test_a_pickled_model_has_its_groups(fitted: tuple[nn.Module, Compensation]) -> None:
    twin = pickle.loads(pickle.dumps(fitted[0]))
    assert torch.equal(outputs(twin), outputs(fitted[0]))


def test_removed_or_replaced_it_leaves_nothing_behind(fitted: tuple[nn.Module, Compensation]) -> None:
    model = copy.deepcopy(fitted[0])
    dense = outputs(TINY["flux"].build("cpu", torch.float32))
    assert len(model._forward_pre_hooks) == 1
    rtlynx.apply(model, SparsityConfig(rank=16))  # again: the compensation stays, and its hook
    assert len(model._forward_pre_hooks) == len(model._load_state_dict_post_hooks) == 1
    calibrated(model, flux_inputs, bias=True)
    assert not model._forward_pre_hooks
    rtlynx.remove(model)
    assert torch.equal(outputs(model), dense)
    assert not model._load_state_dict_post_hooks and not any("bias_group" in key for key in vars(model))
    assert not any("bias_group" in key for module in model.modules() for key in vars(module))


def test_fused_projections_keep_the_groups(fitted: tuple[nn.Module, Compensation]) -> None:
    model = copy.deepcopy(fitted[0])
    want = outputs(model)
    model.fuse_qkv_projections()  # type: ignore[operator]
    fused = [layer for name, layer in sparse_layers(model).items() if name.endswith("to_qkv")]
    assert fused and all(layer.bias_groups == 4 for layer in fused)
    torch.testing.assert_close(outputs(model), want)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_no_step_compiles_again(fitted: tuple[nn.Module, Compensation], whole: bool) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(fitted[0])
    want = outputs(model)
    if whole:
        model.compile(backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # type: ignore[operator]
    output(model, flux_inputs(0.4))
    counters.clear()
    torch.testing.assert_close(outputs(model), want)
    assert counters["stats"]["unique_graphs"] == 0


def test_offloaded_layers_read_the_present_group(fitted: tuple[nn.Module, Compensation]) -> None:
    from accelerate import cpu_offload

    model = copy.deepcopy(fitted[0])
    want = outputs(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(outputs(model), want)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_layers_offloaded_in_groups_do_too(fitted: tuple[nn.Module, Compensation], offload_type: str) -> None:
    model = copy.deepcopy(fitted[0])
    want = outputs(model)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type, **blocks)  # type: ignore[operator]
    torch.testing.assert_close(outputs(model), want)


def test_in_inference_mode_and_outside_of_it(fitted: tuple[nn.Module, Compensation]) -> None:
    model = copy.deepcopy(fitted[0])
    want = outputs(model)
    rtlynx.apply(model, SparsityConfig(rank=16, small_m="sparse"))
    with torch.inference_mode():
        assert torch.equal(outputs(model), want)
    assert torch.equal(outputs(model), want)


def test_dense_steps_and_groups_live_together() -> None:
    config = SparsityConfig(rank=16, small_m="sparse", dense_first=0.1)
    model = rtlynx.apply(TINY["flux"].build("cpu", torch.float32), config)
    dense = output(TINY["flux"].build("cpu", torch.float32), flux_inputs(LEVELS[0]))
    calibrated(model, flux_inputs, bias=4)
    assert torch.equal(output(model, flux_inputs(LEVELS[0])), dense)
    assert relative_error(output(model, flux_inputs(0.3)), dense) > 0


@pytest.mark.parametrize("bias", [-1, 1000, 2.5])
def test_numbers_of_groups_that_are_none(bias: Any) -> None:
    model = rtlynx.apply(Timed(), SparsityConfig(include=("layer",), rank=16))
    with pytest.raises(InvalidArgumentError, match="bias"):
        rtlynx.calibrate(model, run=print, bias=bias)


def test_models_and_runs_that_do_not_tell_the_time_are_refused() -> None:
    model = rtlynx.apply(nn.Sequential(nn.Linear(K, N)), SparsityConfig(include=("0",), rank=16))
    with pytest.raises(InvalidArgumentError, match="'timestep'"):
        rtlynx.calibrate(model, run=lambda: model(torch.randn(300, K)), bias=4)
    timed = rtlynx.apply(Timed(), SparsityConfig(include=("layer",), rank=16))
    with pytest.raises(InvalidArgumentError, match="layer called outside of the model"):
        rtlynx.calibrate(timed, run=lambda: timed.layer(torch.randn(300, K)), bias=4, progress=False)
    assert timed.layer.comp_bias is None


def test_a_pipeline_from_prompts_to_errors_of_layers() -> None:
    pipe = tiny_pipeline()
    rtlynx.apply(pipe, SparsityConfig(rank=16, small_m="sparse"))
    errors = {}
    for bias in (0, 1, 4):
        rtlynx.calibrate(pipe, PROMPTS, bias=bias, progress=False, num_inference_steps=8)
        found = layer_errors(pipe, pipe.transformer, PROMPTS, steps=8, seed=0)
        errors[bias] = sum(found.values()) / len(found)
    assert errors[4] < errors[1] <= errors[0], errors
