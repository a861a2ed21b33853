"""Every example, from its options to the file it writes, with a small transformer in the place of the released pipeline."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from PIL import Image

from rtlynx.linear import SparseLinear
from tiny_models import NEIGHBOURS, TINY, output

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = {**TINY, **NEIGHBOURS}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")


class Standin:
    """What `from_pretrained` of the released pipeline returns; its ``__call__`` refuses what the real one would."""

    def __init__(self, real: type, family: str, two: bool) -> None:
        tiny = MODELS[family]
        self.transformer = tiny.build("cpu", torch.float32)
        self.transformer_2 = tiny.build("cpu", torch.float32) if two else None
        self.inputs = tiny.inputs("cpu", torch.float32)
        self.accepts = inspect.signature(real.__call__)
        self.calls: list[dict[str, Any]] = []
        self.offloaded: list[torch.nn.Module] = []

    def enable_model_cpu_offload(self) -> None:
        """What diffusers does, from the CPU to the CPU."""
        for model in filter(None, (self.transformer, self.transformer_2)):
            accelerate.cpu_offload_with_hook(model, "cpu")
            self.offloaded.append(model)

    def __call__(self, **arguments: Any) -> Any:
        self.accepts.bind(self, **arguments)
        self.calls.append(arguments)
        for model in filter(None, (self.transformer, self.transformer_2)):
            output(model, self.inputs)
        picture = Image.new("RGB", (8, 8))
        return SimpleNamespace(images=[picture], frames=[[picture] * 3])


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> Standin:
    made: list[Standin] = []
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: Path(path).write_bytes(b"video"))
    module = importlib.import_module(name)
    real = next(value for key, value in vars(module).items() if key.endswith("Pipeline"))

    def from_pretrained(model: str, **arguments: Any) -> Standin:
        assert model.count("/") == 1 and arguments["torch_dtype"] in (torch.bfloat16, torch.float16)
        made.append(Standin(real, name, two=name == "wan"))
        return made[-1]

    monkeypatch.setattr(real, "from_pretrained", from_pretrained)
    module.main()
    return made[0]


def test_there_is_one_for_every_family() -> None:
    assert set(NAMES) == set(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_samples_sparse(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    pipe = run(name, monkeypatch, "--out", str(out), "--steps", "2", "--skip", "**.to_k")
    assert out.exists()
    assert pipe.calls[0]["num_inference_steps"] == 2
    tiny = MODELS[name]
    for model in filter(None, (pipe.transformer, pipe.transformer_2)):
        sparse = [key for key, m in model.named_modules() if isinstance(m, SparseLinear)]
        assert 0 < len(sparse) < tiny.sparse_layers and not any(key.endswith("to_k") for key in sparse)
    assert "linear layers are sparse" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_calibrates_once_and_loads_the_next_time(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts, file, out = tmp_path / "prompts.txt", tmp_path / "fitted.safetensors", tmp_path / "out.png"
    prompts.write_text("one\n\ntwo\n")
    options = ("--compensation", str(file), "--calibrate", str(prompts), "--out", str(out))
    first = run(name, monkeypatch, *options)
    assert file.exists()
    assert [call["prompt"] for call in first.calls[:-1]] == [["one"], ["two"]]
    second = run(name, monkeypatch, *options)
    assert len(second.calls) == 1
    for pipe in (first, second):
        for model in filter(None, (pipe.transformer, pipe.transformer_2)):
            assert all(m.rank == 64 for m in model.modules() if isinstance(m, SparseLinear))


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart"])  # of the other two diffusers does not say which blocks are repeated
def test_compiles(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # inductor would take long
    torch._dynamo.reset()
    pipe = run(name, monkeypatch, "--compile", "--out", str(tmp_path / "out.png"))
    assert len(pipe.calls) == 2  # the first compiles, the second is timed
    compiled = [key for key, m in pipe.transformer.named_modules() if m._compiled_call_impl is not None]
    blocks = [key for key, _ in pipe.transformer.named_modules() if key.count(".") == 1 and "transformer_blocks." in key]
    assert compiled == (blocks if pipe.transformer._repeated_blocks else [""])


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_offloads_after_the_model_is_sparse(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = run(name, monkeypatch, "--offload", "--out", str(tmp_path / "out.png"))
    assert pipe.offloaded == list(filter(None, (pipe.transformer, pipe.transformer_2))) and len(pipe.calls) == 1
    for model in pipe.offloaded:  # not where a hook has wrapped the layers first
        assert sum(isinstance(m, SparseLinear) for m in model.modules()) == MODELS[name].sparse_layers


def test_dense_is_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = run("flux", monkeypatch, "--dense", "--out", str(tmp_path / "out.png"))
    assert not any(isinstance(m, SparseLinear) for m in pipe.transformer.modules())


@pytest.mark.parametrize("method", ["split", "joint"])
def test_compact_in_8_bits(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "fitted.safetensors"
    prompts.write_text("one\n")
    options = ("--fp8", "--compact", "--method", method, "--compensation", str(file), "--calibrate", str(prompts))
    for _ in range(2):  # fits, then loads
        pipe = run("flux", monkeypatch, *options, "--out", str(tmp_path / "out.png"))
        layers = [m for m in pipe.transformer.modules() if isinstance(m, SparseLinear)]
        assert layers and all(layer.is_compact and layer.rank == 64 for layer in layers)
        assert all((layer.compact_fitted is not None) == (method == "joint") for layer in layers)
    with pytest.raises(SystemExit):
        run("flux", monkeypatch, "--compact")
