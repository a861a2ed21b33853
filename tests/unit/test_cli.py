"""The command line: facts about this machine, errors in one line, a quick start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from rtlynx import environment
from rtlynx.cli import app
from rtlynx.demo.place import choose_place
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.version import __version__

H200 = {"index": 0, "name": "NVIDIA H200", "capability": (9, 0), "sms": 132, "memory_bytes": 150_754_820_096, "memory_gb_s": 4916}
V100 = {"index": 1, "name": "Tesla V100", "capability": (7, 0), "sms": 80, "memory_bytes": 17_179_869_184, "memory_gb_s": 898}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be on a machine: what the extension and torch report there. None stands for a module that does not import."""

    def pretend(core: Any = None, torch: Any = None) -> None:
        modules = {"rtlynx._core": core, "torch": torch}
        monkeypatch.setattr(environment, "_import", lambda name: (modules[name], "" if modules[name] else f"no {name}"))

    return pretend


def core(
    devices: list[dict[str, Any]] | None = None, targets: tuple[str, ...] = ("sm_80", "sm_90a"), driver: tuple[int, int] = (13, 0)
) -> Any:
    def plan(capability: tuple[int, int], sms: int, **problem: Any) -> str:
        if capability < (8, 0):
            raise DeviceError("plan", "device", capability, "8.0 or newer", f"compute capability {capability} has no sparse tensor cores")
        return "spmm_for_this_test"

    def list_devices() -> list[dict[str, Any]]:
        return devices or []

    return SimpleNamespace(
        device_code=lambda: {
            "targets": list(targets),
            "nvcc": "13.0.88" if targets else None,
            "min_driver": (13, 0) if targets else None,
        },
        driver_version=lambda: None if devices is None else driver,
        devices=list_devices,
        plan_sparse_linear=plan,
    )


def torch_seeing(count: int) -> Any:
    cuda = SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count)
    return SimpleNamespace(__version__="2.9.0", cuda=cuda, version=SimpleNamespace(cuda="13.0" if count else None))


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"rtlynx {__version__}\n")


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "info" in result.stdout and "demo" in result.stdout


def test_info_on_this_machine() -> None:
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    import torch

    assert result.exit_code == 0
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in run("info").stdout


def test_info_without_a_gpu_says_what_is_missing(machine: Callable[..., None]) -> None:
    machine(core(devices=None), torch_seeing(0))
    text = run("info").stdout
    assert "sm_80, sm_90a (nvcc 13.0.88)" in text
    assert "CPU reference" in text
    assert "missing NVIDIA driver" in text


def test_info_names_the_kernel_of_each_gpu_or_why_there_is_none(machine: Callable[..., None]) -> None:
    machine(core([H200, V100]), torch_seeing(2))
    result = json.loads(run("info", "--json").stdout)
    assert [gpu["kernel"] for gpu in result["gpus"]] == ["spmm_for_this_test", None]
    assert "no sparse tensor cores" in result["gpus"][1]["reason"]
    assert result["missing"] == []


@pytest.mark.parametrize(
    ("extension", "torch", "what"),
    [
        (None, torch_seeing(0), "compiled extension"),
        (core([H200], targets=()), torch_seeing(1), "device code"),
        (core([H200], driver=(12, 4)), torch_seeing(1), "new enough driver"),
        (core([]), torch_seeing(0), "GPU"),
        (core([H200]), torch_seeing(0), "torch with CUDA"),
        (core([H200]), None, "torch"),
    ],
)
def test_info_reports_what_is_missing(machine: Callable[..., None], extension: Any, torch: Any, what: str) -> None:
    machine(extension, torch)
    facts = environment.collect()
    assert what in [item.what for item in facts.missing]
    assert not any(gpu.kernel for gpu in facts.gpus)
    assert all(item.remedy for item in facts.missing)


def test_a_driver_that_fails_is_reported(machine: Callable[..., None]) -> None:
    def fail() -> None:
        raise DeviceError("devices", "device", "CUDA 11.4", "CUDA 13.0", "driver CUDA 11.4 is too old")

    broken = core([H200])
    broken.devices = fail
    machine(broken, torch_seeing(1))
    (missing,) = environment.collect().missing
    assert "too old" in missing.consequence


def test_auto_takes_the_first_gpu_the_kernels_run_on(machine: Callable[..., None]) -> None:
    machine(core([dict(V100, index=0), dict(H200, index=1)]), torch_seeing(2))
    place = choose_place("auto")
    assert (str(place.device), place.name, place.on_gpu) == ("cuda:1", "NVIDIA H200", True)


def test_auto_falls_back_to_the_cpu(machine: Callable[..., None]) -> None:
    for extension in (core(devices=None), core([H200], driver=(12, 4))):
        machine(extension, torch_seeing(1))
        assert choose_place("auto").device.type == "cpu"


def test_a_driver_that_is_too_old_is_told(machine: Callable[..., None]) -> None:
    machine(core([H200], driver=(12, 4)), torch_seeing(1))
    with pytest.raises(DeviceError, match=r"cuda:0 \(NVIDIA H200\): the driver supports CUDA 12.4, and the kernels need 13.0"):
        choose_place("cuda:0")
    text = " ".join(run("info").stdout.split())
    assert "missing new enough driver" in text and "nvidia.com/drivers" in text


def test_a_gpu_asked_for_by_name_is_not_replaced(machine: Callable[..., None]) -> None:
    machine(core([dict(V100, index=0)]), torch_seeing(1))
    with pytest.raises(DeviceError, match=r"cuda:0 \(Tesla V100\): .*no sparse tensor cores"):
        choose_place("cuda:0")
    with pytest.raises(DeviceError, match="there is no cuda:3"):
        choose_place("cuda:3")


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_unknown_devices_are_refused(wanted: str) -> None:
    with pytest.raises(InvalidArgumentError, match="expected auto, cpu, cuda or cuda:<index>"):
        choose_place(wanted)


def test_refusals_are_one_line_and_exit_code_2(machine: Callable[..., None]) -> None:
    machine(core(devices=None), torch_seeing(0))
    result = run("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: demo: argument `device`: the kernels cannot run on cuda: NVIDIA driver missing")
    assert result.stderr.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rtlynx.cli.info.collect", fail)
    assert isinstance(run("info").exception, RuntimeError)


@pytest.mark.parametrize(
    "options", [("--prompts", "0"), ("--steps", "0"), ("--rank", "8"), ("--rank", "256"), ("--model", "/nowhere"), ("--colour", "red")]
)
def test_wrong_options_are_exit_code_2(options: tuple[str, str]) -> None:
    result = run("demo", *options)
    assert result.exit_code == 2
    assert options[0] in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("rtlynx.demo.run.run_demo", lambda *_: pytest.fail("sampled"))
    result = run("demo", "--device", "cpu", "--out", str(tmp_path / "file" / "folder"))
    assert result.exit_code == 2
    assert "cannot be made" in result.stderr


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    result = run("demo", "--device", "cpu", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "model_index.json" in result.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, rtlynx.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
