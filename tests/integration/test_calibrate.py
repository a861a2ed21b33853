"""`calibrate` on a small FLUX: the branch helps, files travel, and what does not fit is refused."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import rtlynx
from rtlynx import Compensation, CompensationMismatchError, InvalidArgumentError, SparseLinear, SparsityConfig
from rtlynx.calibrate.calibrate import _solve
from rtlynx.calibrate.collect import LayerInput, all_dense
from rtlynx.calibrate.fit import Fit
from rtlynx.calibrate.samples import Reservoir, Samples
from rtlynx.calibrate.workfolder import WorkFolder, described
from rtlynx.eligibility import sparse_layers
from tiny_models import TINY, output, relative_error

F32 = torch.float32


class Pipe:
    """The least that counts as a pipeline: prompts seed the text, the generator the noise, a few Euler steps follow."""

    def __init__(self) -> None:
        self.transformer = TINY["flux"].build("cpu", F32)
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompt: Sequence[str], num_inference_steps: int = 2, generator: torch.Generator | None = None, output_type: str = "pil"
    ) -> Tensor:
        self.calls.append({"prompt": prompt, "seed": generator and generator.initial_seed(), "output_type": output_type})
        inputs = TINY["flux"].inputs("cpu", F32)
        inputs["hidden_states"] = torch.randn(inputs["hidden_states"].shape, generator=generator)
        text = torch.Generator().manual_seed(hash(tuple(map(len, prompt))) % 1000)
        inputs["encoder_hidden_states"] = torch.randn(inputs["encoder_hidden_states"].shape, generator=text)
        for step in range(num_inference_steps):
            inputs["timestep"] = torch.full((2,), 1 - step / num_inference_steps)
            inputs["hidden_states"] = inputs["hidden_states"] - output(self.transformer, inputs) / num_inference_steps
        return inputs["hidden_states"]


PROMPTS = ["a red square", "a very blue circle on a chequered ground", "two", "green triangle"]


def layer_errors(pipe: Pipe) -> dict[str, float]:
    """Relative output error of every sparse layer on the dense model's activations during calibration."""
    layers = sparse_layers(pipe.transformer)
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers.values()}
    with ExitStack() as hooks, all_dense(layers):
        for layer in layers.values():
            handle = layer.register_forward_pre_hook(lambda module, args: inputs[module].append(args[0].reshape(-1, args[0].shape[-1])))
            hooks.callback(handle.remove)
        for i, prompt in enumerate(PROMPTS):
            pipe([prompt], generator=torch.Generator().manual_seed(i))
    errors = {}
    for name, layer in layers.items():
        x = torch.cat(inputs[layer])
        with torch.no_grad():
            errors[name] = relative_error(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    return errors


class Calibrated(NamedTuple):
    """A pipeline with split of rank 32, its saved file, and errors on the way: of layers, and of the model on an unseen input."""

    pipe: Pipe
    path: Path
    layers: dict[str, dict[str, float]]
    unseen: dict[str, float]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    pipe, inputs = Pipe(), TINY["flux"].inputs("cpu", F32)
    want = output(pipe.transformer, inputs)
    layers, unseen = {}, {}
    rtlynx.apply(pipe, SparsityConfig(rank=32))
    for method in ("norm", "paper", "split"):
        if method != "norm":
            compensation = rtlynx.calibrate(pipe, PROMPTS, method=method, progress=False)  # type: ignore[arg-type]
            assert compensation.method == method
        layers[method], unseen[method] = layer_errors(pipe), relative_error(output(pipe.transformer, inputs), want)
    path = tmp_path_factory.mktemp("compensation") / "tiny.safetensors"
    compensation.save(path)
    return Calibrated(pipe, path, layers, unseen)


def test_the_branch_lowers_the_error_of_every_layer(calibrated: Calibrated) -> None:
    assert len(calibrated.layers["norm"]) == TINY["flux"].sparse_layers
    for name, without in calibrated.layers["norm"].items():
        paper, split = calibrated.layers["paper"][name], calibrated.layers["split"][name]
        assert split < paper < 0.97 * without, name


def test_split_lowers_the_error_of_the_model_on_unseen_input(calibrated: Calibrated) -> None:
    assert calibrated.unseen["split"] < 0.8 * calibrated.unseen["norm"], calibrated.unseen


def test_the_pipeline_is_called_as_documented() -> None:
    pipe = Pipe()
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    rtlynx.calibrate(pipe, PROMPTS[:3], batch_size=2, seed=7, progress=False, num_inference_steps=1)
    assert pipe.calls == [
        {"prompt": PROMPTS[:2], "seed": 7, "output_type": "latent"},
        {"prompt": PROMPTS[2:3], "seed": 9, "output_type": "latent"},
    ]
    assert all(layer.rank == 16 and not layer.dense for layer in sparse_layers(pipe.transformer).values())
    assert {row.rank for row in rtlynx.summary(pipe) if row.sparse} == {16}


def test_selection_is_shifted_unless_told_otherwise() -> None:
    inputs = TINY["flux"].inputs("cpu", F32)
    found = {}
    for selection in (None, (), ("shift",)):
        pipe = Pipe()
        rtlynx.apply(pipe, SparsityConfig(rank=16))
        chosen = {} if selection is None else {"selection": selection}
        found[selection] = rtlynx.calibrate(pipe, run=lambda pipe=pipe: output(pipe.transformer, inputs), progress=False, **chosen)
    by_default = found[None].tensors
    assert by_default.keys() == found["shift",].tensors.keys() and any(name.endswith(".shift") for name in by_default)
    assert all(torch.equal(tensor, found["shift",].tensors[name]) for name, tensor in by_default.items())
    assert not any(name.endswith((".shift", ".comp_bias")) for name in found[()].tensors)


def test_statistics_come_from_the_dense_model_and_hooks_go_away() -> None:
    pipe = Pipe()
    inputs = TINY["flux"].inputs("cpu", F32)
    want = output(pipe.transformer, inputs)
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    seen = []
    rtlynx.calibrate(pipe, run=lambda: seen.append(output(pipe.transformer, inputs)), progress=False)
    assert len(seen) == 1 and torch.equal(seen[0], want)
    assert not any(layer._forward_pre_hooks for layer in sparse_layers(pipe.transformer).values())


def test_little_memory_means_more_passes_and_the_same_result() -> None:
    inputs = TINY["flux"].inputs("cpu", F32)
    results = []
    for memory in (None, 8192 * 640 * 4):
        pipe = Pipe()
        rtlynx.apply(pipe, SparsityConfig(rank=16))
        runs = []
        compensation = rtlynx.calibrate(
            pipe,
            run=lambda runs=runs, pipe=pipe: runs.append(output(pipe.transformer, inputs)),
            memory=memory,
            progress=False,
        )
        results.append((len(runs), compensation))
    assert results[0][0] == 1 and results[1][0] > 2
    for name, tensor in results[0][1].tensors.items():
        assert torch.equal(tensor, results[1][1].tensors[name]), name


def test_samples_of_one_pass_are_gone_before_the_next() -> None:
    inputs = TINY["flux"].inputs("cpu", F32)
    pipe = Pipe()
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    held = []

    def run() -> None:
        held.append(sum(type(each) is Reservoir for each in gc.get_objects()))
        output(pipe.transformer, inputs)

    gc.collect()
    rtlynx.calibrate(pipe, run=run, memory=8192 * 640 * 4, progress=False)
    assert held == [0] * len(held) and len(held) > 2


def test_a_failed_run_leaves_the_model_as_it_was(calibrated: Calibrated) -> None:
    pipe = calibrated.pipe
    inputs = TINY["flux"].inputs("cpu", F32)
    before = output(pipe.transformer, inputs)

    def run() -> None:
        output(pipe.transformer, inputs)
        raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="coffee"):
        rtlynx.calibrate(pipe, run=run, method="paper", progress=False)
    assert torch.equal(output(pipe.transformer, inputs), before)
    assert not any(layer._forward_pre_hooks or layer.dense for layer in sparse_layers(pipe.transformer).values())


def test_non_finite_activations_name_the_layer() -> None:
    pipe = Pipe()
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    inputs = TINY["flux"].inputs("cpu", F32)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].ff.net[0].proj.bias[3] = float("nan")
    with pytest.raises(InvalidArgumentError, match=r"input of transformer_blocks\.0\.ff\.net\.2"):
        rtlynx.calibrate(pipe, run=lambda: output(pipe.transformer, inputs), progress=False)


def test_few_tokens_and_unused_layers_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.ModuleDict({"used": nn.Linear(64, 64), "unused": nn.Linear(64, 64), "small": nn.Linear(64, 8)})
    rtlynx.apply(module, SparsityConfig(include=("**",)))
    with caplog.at_level(logging.WARNING, "rtlynx"):
        rtlynx.calibrate(module, run=lambda: (module["used"](torch.randn(20, 64)), module["small"](torch.randn(200, 64))), progress=False)
    assert "1 layers saw fewer than 2 tokens per channel, first used" in caplog.text
    assert "unused was never called" in caplog.text
    assert [module[name].rank for name in ("used", "unused", "small")] == [64, 0, 16]


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ({}, "prompts and run"),
        ({"prompts": ["a"], "run": print}, "prompts and run"),
        ({"prompts": []}, "at least one"),
        ({"prompts": ["a"], "method": "magic"}, "'magic'"),
        ({"prompts": ["a"], "rank": 10}, "multiple of 16"),
        ({"prompts": ["a"], "rank": 0}, "something to fit"),
        ({"prompts": ["a"], "selection": ("magic",)}, "'magic'"),
        ({"prompts": ["a"], "batch_size": 0}, "at least one"),
        ({"prompts": ["a"], "tokens_per_channel": 0}, "tokens_per_channel"),
        ({"run": print, "steps": 3}, "steps"),
    ],
)
def test_bad_arguments(calibrated: Calibrated, arguments: dict[str, Any], piece: str) -> None:
    with pytest.raises(InvalidArgumentError, match=piece):
        rtlynx.calibrate(calibrated.pipe, **arguments)


def test_models_that_are_not_ready() -> None:
    with pytest.raises(InvalidArgumentError, match="without sparse layers"):
        rtlynx.calibrate(Pipe(), ["a"])
    module = rtlynx.apply(TINY["flux"].build("cpu", F32))
    with pytest.raises(InvalidArgumentError, match="bare module"):
        rtlynx.calibrate(module, ["a"])
    with pytest.raises(InvalidArgumentError, match="stayed dense"):
        rtlynx.calibrate(rtlynx.apply(nn.Sequential(nn.Linear(3, 3)), SparsityConfig(include=("0",))), run=print)
    rtlynx.apply(module, SparsityConfig(branch="none"))
    with pytest.raises(InvalidArgumentError, match="something to fit"):
        rtlynx.calibrate(module, run=print, selection=())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    inputs = TINY["flux"].inputs("cpu", F32)
    path, memory = tmp_path / "tiny.safetensors", 8192 * 640 * 4

    def calibrate(pipe: Pipe, fail_at: int | None = None, **options: Any) -> tuple[Compensation, int]:
        runs = []

        def run() -> None:
            runs.append(1)
            if len(runs) == fail_at:
                raise KeyboardInterrupt
            output(pipe.transformer, inputs)

        return rtlynx.calibrate(pipe, run=run, memory=memory, progress=False, **options), len(runs)

    def fresh() -> Pipe:
        return rtlynx.apply(Pipe(), SparsityConfig(rank=16))

    at_once, passes = calibrate(fresh())
    with pytest.raises(KeyboardInterrupt):
        calibrate(fresh(), fail_at=passes, output=path)
    assert not path.exists() and len(list(tmp_path.glob("*.work/*.safetensors"))) > 5
    with pytest.raises(InvalidArgumentError, match="other settings"):
        calibrate(fresh(), output=path, seed=1)
    resumed, passes_left = calibrate(fresh(), output=path)
    assert passes_left == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    saved = Compensation.load(path)
    assert saved.made_with["method"] == "split" and saved.made_with == resumed.made_with
    for name, tensor in at_once.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]) and torch.equal(tensor, saved.tensors[name]), name


def test_a_run_that_solved_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    path, inputs = tmp_path / "tiny.safetensors", TINY["flux"].inputs("cpu", F32)
    pipe = rtlynx.apply(Pipe(), SparsityConfig(rank=16))

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtlynx.calibrate(pipe, run=fail, output=path, progress=False)
    rtlynx.calibrate(pipe, run=lambda: output(pipe.transformer, inputs), output=path, seed=1, progress=False)
    assert path.is_file()


def test_arguments_are_described_by_what_they_are() -> None:
    def arguments(seed: int = 0, colour: int = 0) -> dict[str, object]:
        picture = Image.new("RGB", (4, 4), (colour, 0, 0))
        values = torch.ones(3, dtype=torch.bfloat16) * colour
        return {"generator": torch.Generator().manual_seed(seed), "image": [picture], "latents": values, "callback": fail, "steps": 8}

    def fail() -> None: ...

    assert described(arguments()) == described(arguments())
    assert described(arguments()) != described(arguments(seed=1)) and described(arguments()) != described(arguments(colour=1))
    assert [key for key, _ in described(arguments())] == ["callback", "generator", "image", "latents", "steps"]


def test_too_little_memory_is_refused() -> None:
    nothing = LayerInput({"a": SparseLinear(64, 64)}, Samples(torch.empty(0, 64), torch.empty(0, dtype=torch.int32)), 1000)
    with pytest.raises(InvalidArgumentError, match="`memory`: got so little that no token of a was kept"):
        _solve(nothing, Fit("split", 16), torch.device("cpu"))


@pytest.mark.parametrize("saves", [1, 2, 5])
def test_an_interruption_between_two_saves_changes_nothing(saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, path = TINY["flux"].inputs("cpu", F32), tmp_path / "tiny.safetensors"

    def calibrate(output_file: Path | None) -> Compensation:
        pipe = rtlynx.apply(Pipe(), SparsityConfig(rank=16))
        return rtlynx.calibrate(pipe, run=lambda: output(pipe.transformer, inputs), progress=False, output=output_file)

    at_once, save, count = calibrate(None), WorkFolder.save, iter(range(100))

    def interrupted(folder: WorkFolder, solved: Any) -> None:
        if next(count) == saves:
            raise KeyboardInterrupt
        save(folder, solved)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    assert len(list(tmp_path.glob("*.work/*.safetensors"))) == saves
    resumed = calibrate(path)
    assert resumed.tensors.keys() == at_once.tensors.keys()
    for name, tensor in at_once.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name


@pytest.mark.parametrize("method", ["split", "joint"])
def test_everything_calibration_finds_travels_in_the_file(method: str, tmp_path: Path) -> None:
    pipe, inputs = rtlynx.apply(Pipe(), SparsityConfig(rank=16)), TINY["flux"].inputs("cpu", F32)
    options = {"method": method, "selection": ("shift", "permutation"), "bias": True}
    rtlynx.calibrate(pipe, run=lambda: output(pipe.transformer, inputs), progress=False, output=tmp_path / "all.safetensors", **options)  # type: ignore[arg-type]
    want = output(pipe.transformer, inputs)
    loaded = rtlynx.load_compensation(Pipe(), tmp_path / "all.safetensors")
    assert loaded.method == method
    kinds = {key.rpartition(".")[2] for key in loaded.tensors}
    expected = {"comp_down", "comp_up", "comp_bias", "shift", "permutation"}
    assert all(layer.places is not None for layer in sparse_layers(pipe.transformer).values() if layer.permutation is not None)
    assert kinds == (expected | {"sparse_weight"} if method == "joint" else expected)  # a permuted weight is made again, not stored
    other = Pipe()
    rtlynx.load_compensation(other, tmp_path / "all.safetensors")
    assert torch.equal(output(other.transformer, inputs), want)
    again = rtlynx.apply(Pipe(), replace(SparsityConfig(rank=16), small_m="sparse"))
    for _ in range(2):  # by state dict, into layers without and with a compensation
        again.transformer.load_state_dict(pipe.transformer.state_dict())
        assert torch.equal(output(again.transformer, inputs), want)


# ---- files ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True])
def test_a_file_gives_another_copy_of_the_model_the_same_output(calibrated: Calibrated, applied: bool) -> None:
    pipe, path = calibrated.pipe, calibrated.path
    other = Pipe()
    if applied:
        rtlynx.apply(other)
    loaded = rtlynx.load_compensation(other, path)
    inputs = TINY["flux"].inputs("cpu", F32)
    assert torch.equal(output(other.transformer, inputs), output(pipe.transformer, inputs))
    assert loaded.config == SparsityConfig(rank=32) and loaded.method == "split"


def test_saving_what_a_model_holds_saves_the_same(calibrated: Calibrated, tmp_path: Path) -> None:
    pipe, path = calibrated.pipe, calibrated.path
    rtlynx.save_compensation(pipe, tmp_path / "again.safetensors")
    again, first = Compensation.load(tmp_path / "again.safetensors"), Compensation.load(path)
    assert (again.config, again.layers) == (first.config, first.layers)
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)


def test_layers_kept_dense_are_left_alone(calibrated: Calibrated) -> None:
    other = Pipe()
    rtlynx.apply(other, SparsityConfig(skip=("single_transformer_blocks.*.proj_out",)))
    rtlynx.load_compensation(other, calibrated.path)
    ranks = {row.name: row.rank for row in rtlynx.summary(other)}
    assert ranks["single_transformer_blocks.0.proj_out"] == 0
    assert ranks["single_transformer_blocks.0.proj_mlp"] == 32


def test_another_model_is_refused_and_left_unchanged(calibrated: Calibrated) -> None:
    other = Pipe()
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.to_k.weight.mul_(1.01)
    with pytest.raises(CompensationMismatchError, match=r"1 of 22 layers differ, first transformer_blocks\.0\.attn\.to_k") as refusal:
        rtlynx.load_compensation(other, calibrated.path)
    assert (refusal.value.op, refusal.value.argument) == ("Compensation", "pipe_or_module")
    assert refusal.value.got == "other weights: 1 of 22 layers differ, first transformer_blocks.0.attn.to_k"
    assert refusal.value.expected == "the weights that it was made for"
    assert not sparse_layers(other.transformer)
    qwen = TINY["qwen_image"].build("cpu", F32)
    with pytest.raises(CompensationMismatchError, match="made without transformer_blocks"):
        rtlynx.load_compensation(qwen, calibrated.path)
    with pytest.raises(CompensationMismatchError, match="no sparse layer"):
        rtlynx.load_compensation(nn.Sequential(nn.Linear(3, 3)), calibrated.path)


@pytest.mark.parametrize("key, cut", [("comp_down", slice(0, 16)), ("shift", slice(0, 3)), ("comp_up", slice(0, 8))])
@pytest.mark.parametrize("sparse", [False, True])
def test_tensors_that_do_not_fit_are_refused_before_a_layer_is_changed(calibrated: Calibrated, sparse: bool, key: str, cut: slice) -> None:
    whole = Compensation.load(calibrated.path)
    last = [name for name in whole.tensors if name.endswith(f".{key}")][-1]
    broken = replace(whole, tensors={**whole.tensors, last: whole.tensors[last][cut]})
    other = Pipe()
    if sparse:
        rtlynx.apply(other)
    with pytest.raises(CompensationMismatchError, match=re.escape(last.removesuffix(f".{key}"))) as refusal:
        broken.apply_to(other)
    assert refusal.value.argument == "tensors" and "expected" in str(refusal.value)
    layers = sparse_layers(other.transformer)
    assert bool(layers) is sparse
    assert all(layer.rank == 0 and layer.shift is None for layer in layers.values())


def test_other_arithmetic_is_refused(calibrated: Calibrated) -> None:
    other = Pipe()
    rtlynx.apply(other, SparsityConfig(branch="input"))
    with pytest.raises(CompensationMismatchError, match="branch='input'") as refusal:
        rtlynx.load_compensation(other, calibrated.path)
    assert refusal.value.argument == "pipe_or_module"
    assert "branch='input'" in refusal.value.got and "branch='dropped'" in refusal.value.expected
    assert all(layer.rank == 0 for layer in sparse_layers(other.transformer).values())


def test_other_files_are_refused(tmp_path: Path, calibrated: Calibrated) -> None:
    (tmp_path / "text").write_text("not a tensor in sight, but long enough to be read as a header")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    for name, version in (("older", "1"), ("newer", "99")):  # in version 1 comp_down was (r, K)
        metadata = {"format": "rtlynx-compensation", "format_version": version, "config": json.dumps({}), "layers": "{}"}
        save_file({"a": torch.zeros(1)}, tmp_path / name, metadata)
    for name, left in (("no layers", {"config": "{}"}), ("no json", {"config": "{", "layers": "{}"})):
        save_file({"a": torch.zeros(1)}, tmp_path / name, {"format": "rtlynx-compensation", "format_version": "2", **left})
        with pytest.raises(CompensationMismatchError, match="is damaged"):
            Compensation.load(tmp_path / name)
    pieces = {"text": "not a safetensors file", "plain": "not a compensation file", "older": "version 1, ", "newer": "version 99, "}
    for name, piece in pieces.items():
        with pytest.raises(CompensationMismatchError, match=piece) as refusal:
            Compensation.load(tmp_path / name)
        assert refusal.value.argument == "path" and str(tmp_path / name) in str(refusal.value)
    assert (refusal.value.got, refusal.value.expected) == ("format version 99", "format version 2")
    with pytest.raises(FileNotFoundError):
        Compensation.load(tmp_path / "absent")


# ---- pipelines with two transformers ----------------------------------------------------------------------------------------------------


def test_two_transformers_are_one_compensation(tmp_path: Path) -> None:
    tiny, path = TINY["flux"], tmp_path / "both.safetensors"
    inputs = tiny.inputs("cpu", F32)

    def two() -> Any:
        pipe = SimpleNamespace(transformer=tiny.build("cpu", F32), transformer_2=tiny.build("cpu", F32))
        with torch.no_grad():
            for parameter in pipe.transformer_2.parameters():
                parameter.mul_(1.1)
        return pipe

    def outputs(pipe: Any) -> torch.Tensor:
        return torch.stack([output(pipe.transformer, inputs), output(pipe.transformer_2, inputs)])

    pipe = rtlynx.apply(two(), SparsityConfig(rank=16))
    rtlynx.calibrate(pipe, run=lambda: outputs(pipe), progress=False, output=path)
    want, saved = outputs(pipe), Compensation.load(path)
    first, second = ({n for n in saved.layers if n.startswith("transformer_2.") is is_second} for is_second in (False, True))
    assert second == {f"transformer_2.{name}" for name in first} and len(first) == tiny.sparse_layers
    for other in (two(), rtlynx.apply(two())):  # into dense models, and into sparse ones
        rtlynx.load_compensation(other, path)
        assert torch.equal(outputs(other), want)
    swapped = two()
    swapped.transformer, swapped.transformer_2 = swapped.transformer_2, swapped.transformer
    with pytest.raises(CompensationMismatchError, match="other weights"):
        rtlynx.load_compensation(swapped, path)
    assert not sparse_layers(swapped.transformer) and not sparse_layers(swapped.transformer_2)

    alone = two()  # only one of them sparse: the other is left out
    rtlynx.apply(alone.transformer, SparsityConfig(rank=16))
    rtlynx.calibrate(alone, run=lambda: outputs(alone), progress=False)
    assert set(Compensation.from_model(alone).layers) == first
    rtlynx.apply(alone.transformer_2, SparsityConfig(rank=32))
    with pytest.raises(InvalidArgumentError, match="different configurations"):
        rtlynx.save_compensation(alone, tmp_path / "mixed.safetensors")


def test_large_activations_get_a_scale_for_fp8_that_travels(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(1)
        module = nn.ModuleDict({"loud": nn.Linear(64, 32), "quiet": nn.Linear(64, 32)})
        return rtlynx.apply(module, SparsityConfig(include=("loud", "quiet"), rank=16, precision="fp8"))

    def run() -> None:
        x = torch.randn(300, 64)
        module["loud"](1000 * x / x.abs().max())
        module["quiet"](x)

    module = model()
    rtlynx.calibrate(module, run=run, progress=False, output=tmp_path / "fitted.safetensors")
    assert (module["loud"].values_scale, module["quiet"].values_scale) == (2.0**-3, 1.0)  # 2 * 1000 / 8 fits into 448
    rtlynx.save_compensation(module, tmp_path / "held.safetensors")
    for name in ("fitted", "held"):
        other = model()
        rtlynx.load_compensation(other, tmp_path / f"{name}.safetensors")
        assert (other["loud"].values_scale, other["quiet"].values_scale) == (2.0**-3, 1.0)
        torch.testing.assert_close(other["loud"].weight_scale, module["loud"].weight_scale)
