"""``from_pretrained(quantization_config=RTLynxConfig(...))``: load, save, reload; the same model as `apply` makes."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, HunyuanVideoTransformer3DModel, PipelineQuantizationConfig, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rtlynx
from original_layouts import original_layout
from rtlynx import InvalidArgumentError, RTLynxConfig, SparsityConfig
from rtlynx.apply import applied_config
from rtlynx.eligibility import sparse_layers
from sparse_models import MODELS
from tiny_models import TINY, Tiny, output, relative_error
from tiny_pipelines import flux_pipeline, sample, sample_guided, wan_pipeline

families = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
FLUX = TINY["flux"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vanilla(tmp_path: Path) -> Path:
    """A saved small FLUX without anything of rtlynx."""
    FLUX.build("cpu", torch.float32).save_pretrained(tmp_path / "vanilla")
    return tmp_path / "vanilla"


def load(path: Path, config: RTLynxConfig | None = None, **kwargs: Any) -> Any:
    given = {} if config is None else {"quantization_config": config}
    return FluxTransformer2DModel.from_pretrained(path, **given, **kwargs)


def out(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return output(model, FLUX.inputs("cpu", dtype))


def saved_config(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def calibrated(path: Path, config: RTLynxConfig | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    model = load(path, config or RTLynxConfig(rank=16), torch_dtype=dtype)
    rtlynx.calibrate(model, run=lambda: out(model, dtype), progress=False, **kwargs)
    return model


# ---- loading -----------------------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    "dtype, precision", [(torch.float32, "model"), (torch.bfloat16, "model"), (torch.float16, "model"), (torch.bfloat16, "fp8")], ids=str
)
def test_loads_what_apply_makes(tiny: Tiny, dtype: torch.dtype, precision: Any, tmp_path: Path) -> None:
    dense = tiny.build("cpu", dtype)
    dense.save_pretrained(tmp_path)
    config = SparsityConfig(selection="weight", skip=("**.to_q",), precision=precision)
    model, info = type(dense).from_pretrained(
        tmp_path, quantization_config=RTLynxConfig(config), torch_dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    want = rtlynx.apply(dense, config)
    assert str(rtlynx.summary(model)) == str(rtlynx.summary(want))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    inputs = tiny.inputs("cpu", dtype)
    assert torch.equal(output(model, inputs), output(want, inputs))


def test_layers_that_cannot_be_sparse_stay_dense_and_say_why(vanilla: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RTLynxConfig(include=("x_embedder", "proj_out", "transformer_blocks.*.ff.net.2"))
    with caplog.at_level(logging.WARNING, "rtlynx"):
        model = load(vanilla, config)
    rows = {row.name: row for row in rtlynx.summary(model)}
    reason = "in_features = 16 is not a positive multiple of 64"
    assert rows["x_embedder"].reason == reason and f"dense: x_embedder: {reason}" in caplog.text
    assert rows["transformer_blocks.0.ff.net.2"].sparse


def test_a_dtype_without_kernels_is_judged_after_loading(vanilla: Path) -> None:
    # Single files are built in float32 and cast while they load: only then is there something to judge.
    model = FluxTransformer2DModel.from_single_file(
        str(vanilla / WEIGHTS), config=str(vanilla), quantization_config=RTLynxConfig(), torch_dtype=torch.float64
    )
    rows = list(rtlynx.summary(model))
    assert not any(row.sparse for row in rows)
    assert sum(row.reason == "no implementation for float64 on cpu" for row in rows) == FLUX.sparse_layers


def test_missing_weights_are_still_reported(vanilla: Path) -> None:
    state = load_file(vanilla / WEIGHTS)
    del state["proj_out.bias"]
    save_file(state, vanilla / WEIGHTS, {"format": "pt"})
    _, info = load(vanilla, RTLynxConfig(), output_loading_info=True)
    assert info["missing_keys"] == ["proj_out.bias"]


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_map(vanilla: Path, device_map: Any) -> None:
    model = load(vanilla, RTLynxConfig(selection="weight"), device_map=device_map)
    assert torch.equal(out(model), out(load(vanilla, RTLynxConfig(selection="weight"))))


def test_single_file_and_a_compensation_file(vanilla: Path, tmp_path: Path) -> None:
    model = calibrated(vanilla)
    rtlynx.save_compensation(model, tmp_path / "compensation.safetensors")
    again = FluxTransformer2DModel.from_single_file(str(vanilla / WEIGHTS), config=str(vanilla), quantization_config=RTLynxConfig(rank=16))
    rtlynx.load_compensation(again, tmp_path / "compensation.safetensors")
    assert torch.equal(out(again), out(model))


PREFIX = "model.diffusion_model."  # of ComfyUI's files; diffusers' conversion of FLUX.2 does not know it


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        *(("sd3", prefix) for prefix in ("", PREFIX)),
        ("flux2", ""),
        *(("z_image", prefix) for prefix in ("", PREFIX)),
        ("wan", PREFIX),
        ("qwen_image", ""),
        ("ltx", PREFIX),
    ],
)
def test_a_single_file_of_the_original_code(family: str, prefix: str, tmp_path: Path) -> None:
    tiny = MODELS[family]
    dense = tiny.build("cpu", torch.float32)
    state = original_layout(family, dense.state_dict(), prefix)
    renamed = sum(key.removeprefix(PREFIX) not in dense.state_dict() for key in state) / len(state)
    assert renamed > (0.1 if family == "ltx" else 0.3) or (family == "qwen_image" and renamed == 0)
    again = from_single_file(dense, state, tmp_path)
    check_loaded(again, dense, tiny.inputs("cpu", torch.float32), tiny.sparse_layers)
    check_compensated(again, dense, tiny.inputs("cpu", torch.float32), tmp_path)


HUNYUAN_VIDEO = MODELS["hunyuan_video"]


def hunyuan_video(**config: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model, and its weights as its authors name them."""
    torch.manual_seed(0)
    dense = HunyuanVideoTransformer3DModel.from_config({**HUNYUAN_VIDEO.build("meta", torch.float32).config, **config}).eval()
    state = original_layout("hunyuan_video", dense.state_dict())
    assert state.keys().isdisjoint(dense.state_dict())
    return dense, state


def test_a_single_file_of_hunyuan_video(tmp_path: Path) -> None:
    dense, state = hunyuan_video(num_single_layers=0)
    again, inputs = from_single_file(dense, state, tmp_path), HUNYUAN_VIDEO.inputs("cpu", torch.float32)
    check_loaded(again, dense, inputs, 12 + 6)
    check_compensated(again, dense, inputs, tmp_path)


def test_a_single_file_of_hunyuan_videos_single_stream_blocks(tmp_path: Path) -> None:
    """Of the released width, the only one that diffusers converts; the rest of the model is left out or small."""
    dense, state = hunyuan_video(num_layers=0, num_single_layers=1, num_refiner_layers=0, num_attention_heads=96, mlp_ratio=0.25)
    again = from_single_file(dense, state, tmp_path)
    check_loaded(again, dense, HUNYUAN_VIDEO.inputs("cpu", torch.float32, side=2, text=6), 5)  # type: ignore[call-arg]


def from_single_file(dense: Any, state: dict[str, Tensor], folder: Path) -> Any:
    """The sparse model of a state dict and the configuration of ``dense``, which becomes as sparse."""
    dense.save_config(folder)
    save_file(state, folder / "original.safetensors")
    config = SparsityConfig(selection="weight", rank=16)
    rtlynx.apply(dense, config)
    return type(dense).from_single_file(str(folder / "original.safetensors"), config=str(folder), quantization_config=RTLynxConfig(config))


def check_loaded(again: Any, dense: Any, inputs: dict[str, Any], sparse: int) -> None:
    assert torch.equal(output(again, inputs), output(dense, inputs))
    assert len(sparse_layers(again)) == sparse


def check_compensated(again: Any, dense: Any, inputs: dict[str, Any], folder: Path) -> None:
    """What is fitted to one fits the other: it knows the weights by what is in them, not by the file."""
    rtlynx.calibrate(dense, run=lambda: output(dense, inputs), progress=False)
    rtlynx.save_compensation(dense, folder / "compensation.safetensors")
    rtlynx.load_compensation(again, folder / "compensation.safetensors")
    assert torch.equal(output(again, inputs), output(dense, inputs))


# ---- saving and reloading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_calibrate_save_reload(vanilla: Path, tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    # Loaded as split with the default rank, calibrated as something else: the saved config must follow.
    model = calibrated(vanilla, RTLynxConfig(), dtype, method="paper", rank=32)
    for layer in model.modules():
        if isinstance(layer, rtlynx.SparseLinear):
            layer.set_compensation(layer.comp_down, layer.comp_up, torch.randn(layer.in_features) * 1e-3)
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB" if sharded else "10GB")
    assert saved_config(tmp_path / "saved") == {"quant_method": "rtlynx", **SparsityConfig(rank=32, branch="input").to_dict()}
    again, info = load(tmp_path / "saved", torch_dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert applied_config(again) == applied_config(model)
    want, got = model.state_dict(), again.state_dict()
    assert any("comp_down" in key for key in want) and any("shift" in key for key in want)
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want)
    assert torch.equal(out(again, dtype), out(model, dtype))


def test_compensation_of_another_rank_than_the_config_says(vanilla: Path, tmp_path: Path) -> None:
    model = rtlynx.apply(load(vanilla), SparsityConfig(rank=16))
    rtlynx.calibrate(model, run=lambda: out(model), progress=False)
    model.save_pretrained(tmp_path / "saved")  # by the first way in: config.json says nothing of rtlynx
    assert torch.equal(out(load(tmp_path / "saved", RTLynxConfig(rank=64))), out(model))
    with pytest.raises(rtlynx.CompensationMismatchError, match="ignore_mismatched_sizes"):
        load(tmp_path / "saved", RTLynxConfig(rank=64), ignore_mismatched_sizes=True)


@pytest.mark.parametrize("break_it", [lambda state, key: state.pop(key), lambda state, key: state.update({key: state[key][:8]})])
def test_a_broken_compensation_is_refused(vanilla: Path, tmp_path: Path, break_it: Any) -> None:
    calibrated(vanilla).save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / WEIGHTS)
    break_it(state, next(key for key in state if key.endswith("comp_up")))
    save_file(state, tmp_path / "saved" / WEIGHTS, {"format": "pt"})
    with pytest.raises(rtlynx.CompensationMismatchError, match=r"transformer_blocks.*comp_up") as refusal:
        load(tmp_path / "saved")
    assert (refusal.value.op, refusal.value.argument) == ("RTLynxConfig", "checkpoint")


def test_shared_branches_ranks_of_single_layers_and_dense_steps_survive(vanilla: Path, tmp_path: Path) -> None:
    config = RTLynxConfig(rank=16, ranks={"transformer_blocks.*.ff.**": 32}, dense_last=0.1, small_m="sparse")
    model = calibrated(vanilla, config, selection=("shift", "permutation"))
    assert {layer.sharing for layer in sparse_layers(model).values()} == {1, 3, 4}
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(out(again), out(model)) and applied_config(again) == applied_config(model)
    layers = sparse_layers(again)
    assert {layer.sharing for layer in layers.values()} == {1, 3, 4} and {layer.rank for layer in layers.values()} == {16, 32}
    assert len(again._forward_pre_hooks) == 1


def test_reload_needs_the_registration(vanilla: Path, tmp_path: Path) -> None:
    load(vanilla, RTLynxConfig()).save_pretrained(tmp_path / "saved")
    script = f"""
import rtlynx
from diffusers import FluxTransformer2DModel
try:
    FluxTransformer2DModel.from_pretrained({str(tmp_path / "saved")!r})
except ValueError as error:
    assert "Unknown quantization type" in str(error), error
else:
    raise AssertionError("loaded")
rtlynx.RTLynxConfig
model = FluxTransformer2DModel.from_pretrained({str(tmp_path / "saved")!r})
assert sum(row.sparse for row in rtlynx.summary(model)) == {FLUX.sparse_layers}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what users do with the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undo", [rtlynx.remove, lambda model: model.dequantize()], ids=["remove", "dequantize"])
def test_remove(vanilla: Path, tmp_path: Path, undo: Any) -> None:
    model = load(vanilla, RTLynxConfig())
    undo(model)
    assert all(type(layer) is nn.Linear for layer in model.modules() if isinstance(layer, nn.Linear))
    assert torch.equal(out(model), out(load(vanilla)))
    for name in ("saved", "again"):
        model.save_pretrained(tmp_path / name)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        again = load(tmp_path / name)
        assert torch.equal(out(again), out(model))
        model = again


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_saves_its_own_configuration(vanilla: Path, tmp_path: Path, clone: Any) -> None:
    model = load(vanilla, RTLynxConfig(rank=16))
    copied = clone(model)
    rtlynx.apply(copied, SparsityConfig(rank=32))
    for name, which in (("model", model), ("copied", copied)):
        which.save_pretrained(tmp_path / name)
    assert saved_config(tmp_path / "model")["rank"] == 16
    assert saved_config(tmp_path / "copied")["rank"] == 32


def test_two_models_share_a_config(vanilla: Path, tmp_path: Path) -> None:
    config = RTLynxConfig(rank=16)
    first, second = load(vanilla, config), load(vanilla, config)
    rtlynx.apply(second, SparsityConfig(rank=32))
    first.save_pretrained(tmp_path / "first")
    assert saved_config(tmp_path / "first")["rank"] == 16 and config.sparsity.rank == 16


def test_the_model_is_freed_with_its_last_reference(vanilla: Path) -> None:
    model = load(vanilla, RTLynxConfig())
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_casting_after_loading(vanilla: Path) -> None:
    want = out(load(vanilla, RTLynxConfig(), torch_dtype=torch.bfloat16), torch.bfloat16)
    assert torch.equal(out(load(vanilla, RTLynxConfig()).to(torch.bfloat16), torch.bfloat16), want)


def test_pipeline(tmp_path: Path) -> None:
    from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline

    config = PipelineQuantizationConfig(quant_mapping={"transformer": RTLynxConfig()})
    pipe = ScenesPipeline.from_pretrained(DEFAULT_WEIGHTS, quantization_config=config)
    dense = ScenesPipeline.from_pretrained(DEFAULT_WEIGHTS)

    def picture(pipe: ScenesPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle at the top left on yellow stripes", 1, generator=generator, output_type="pt").images

    got = picture(pipe)
    assert not torch.equal(got, picture(dense))
    assert torch.equal(got, picture(rtlynx.apply(dense)))
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(ScenesPipeline.from_pretrained(tmp_path)), got)


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    dense = flux_pipeline()
    dense.save_pretrained(tmp_path / "dense")
    config = SparsityConfig(rank=16)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": RTLynxConfig(config)})
    pipe = flux_pipeline_from(tmp_path / "dense", quantization_config=mapping)
    got = sample(pipe)
    assert torch.equal(got, sample(rtlynx.apply(dense, config))) and not sparse_layers(pipe.vae)
    assert sum(row.sparse for row in rtlynx.summary(pipe)) == FLUX.sparse_layers
    rtlynx.calibrate(pipe, run=lambda: sample(pipe), progress=False)
    compensated = sample(pipe)
    pipe.save_pretrained(tmp_path / "sparse")
    assert saved_config(tmp_path / "sparse" / "transformer")["rank"] == 16
    again = sample(flux_pipeline_from(tmp_path / "sparse"))
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):  # diffusers' own: the folder decides
        other = PipelineQuantizationConfig(quant_mapping={"transformer": RTLynxConfig(rank=32, skip=("**.to_q",))})
        asked = sample(flux_pipeline_from(tmp_path / "sparse", quantization_config=other))
    # Not equal: sums may depend on where in memory a weight lies.
    assert max(relative_error(again, compensated), relative_error(asked, compensated)) < 1e-4 < relative_error(got, compensated)


def test_a_pipeline_of_two_transformers(tmp_path: Path) -> None:
    """Wan 2.2: one for the noisy half of the way, one for the rest; each with a configuration of its own."""

    def loaded(name: str, **given: Any) -> Any:
        pipe = WanPipeline.from_pretrained(tmp_path / name, tokenizer=None, text_encoder=None, **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    configs = {"transformer": SparsityConfig(rank=16), "transformer_2": SparsityConfig(rank=32, skip=("**.ffn.**",))}
    wan_pipeline(two=True).save_pretrained(tmp_path / "dense")
    mapping = PipelineQuantizationConfig(quant_mapping={name: RTLynxConfig(config) for name, config in configs.items()})
    pipe, dense = loaded("dense", quantization_config=mapping), loaded("dense")
    got, want = sample_guided(pipe), sample_guided(dense)
    for name, config in configs.items():
        assert applied_config(getattr(pipe, name)) == config
        rtlynx.apply(getattr(dense, name), config)
        assert not torch.equal(sample_guided(dense), want)  # each of the two makes a difference
        want = sample_guided(dense)
    assert torch.equal(got, want)
    pipe.save_pretrained(tmp_path / "sparse")
    again = loaded("sparse")
    assert {name: applied_config(getattr(again, name)) for name in configs} == configs
    assert torch.equal(sample_guided(again), got)


def flux_pipeline_from(path: Path, **given: Any) -> Any:
    texts = dict.fromkeys(("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))  # prompts are embeddings here
    pipe = FluxPipeline.from_pretrained(path, **texts, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the configuration -------------------------------------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    config = RTLynxConfig(rank=32, skip=("a.*",))
    assert config.sparsity == SparsityConfig(rank=32, skip=("a.*",)) and config == RTLynxConfig(config.sparsity)
    assert RTLynxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config != RTLynxConfig()
    assert '"rank": 32' in repr(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 32}, "ranks"),
        ({"rank": 7}, "rank"),
        ({"sparsity": SparsityConfig(), "rank": 32}, "rank"),
        ({"sparsity": {"rank": 32}}, "SparsityConfig"),
        ({"quant_method": "gguf"}, "gguf"),
    ],
)
def test_config_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        RTLynxConfig(**arguments)


def test_unknown_keys_in_a_saved_config(vanilla: Path, tmp_path: Path) -> None:
    load(vanilla, RTLynxConfig()).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["from_the_future"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidArgumentError, match="from_the_future"):
        load(tmp_path / "saved")
