"""The autotune cache: what is saved is found again, for the same machine only, and a broken file costs nothing but a warning."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtlynx import _core, plans
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.plans import Machine, Problem

H200 = Machine(gpu="NVIDIA H200", driver="13.0", rtlynx="0.1.0", kernels=("spmm_a", "spmm_b"))
ATTENTION, MLP = Problem(4096, 3072, 3072, 64), Problem(4096, 12288, 3072, 64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTLYNX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_plans_come_back() -> None:
    assert plans.load(H200) == {}
    plans.save(H200, {ATTENTION: "spmm_a", MLP: "spmm_b"})
    assert plans.load(H200) == {ATTENTION: "spmm_a", MLP: "spmm_b"}


def test_new_plans_join_the_old_ones_and_replace_the_same_problems() -> None:
    plans.save(H200, {ATTENTION: "spmm_a", MLP: "spmm_b"})
    half = dataclasses.replace(MLP, dtype="float16")
    path = plans.save(H200, {MLP: "spmm_a", half: "spmm_b"})
    assert plans.load(H200) == {ATTENTION: "spmm_a", MLP: "spmm_a", half: "spmm_b"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA H100"}, {"driver": "13.1"}, {"rtlynx": "0.1.1"}, {"kernels": ("spmm_a",)}])
def test_another_machine_or_build_has_plans_of_its_own(change: dict[str, object]) -> None:
    plans.save(H200, {ATTENTION: "spmm_a"})
    other = dataclasses.replace(H200, **change)  # type: ignore[arg-type]
    assert plans.load(other) == {}
    plans.save(other, {ATTENTION: "spmm_b"})
    assert plans.load(H200) == {ATTENTION: "spmm_a"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "plans": [{"problem": {"m": 1}, "kernel": "x"}]}'])
def test_a_broken_file_is_ignored_with_a_warning_and_can_be_written_again(content: str) -> None:
    path = plans.save(H200, {ATTENTION: "spmm_a"})
    path.write_text(content)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert plans.load(H200) == {}
    with pytest.warns(UserWarning, match="cannot be read"):
        plans.save(H200, {MLP: "spmm_b"})
    assert plans.load(H200) == {MLP: "spmm_b"}


def test_a_file_of_another_format_is_not_read() -> None:
    path = plans.save(H200, {ATTENTION: "spmm_a"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": plans.FORMAT + 1}))
    assert plans.load(H200) == {}


def test_the_folder_is_the_users(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert H200.path.parent == folder / "plans"
    monkeypatch.delenv("RTLYNX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plans.cache_folder() == tmp_path / "xdg" / "rtlynx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plans.cache_folder() == tmp_path / ".cache" / "rtlynx"


def test_a_user_without_a_home_has_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RTLYNX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert plans.load(H200) == {}


class Core(SimpleNamespace):
    """The extension on a machine with these GPUs, as far as plans are concerned; `running` is what was set."""

    def __init__(self, *gpus: tuple[str, tuple[int, int]]) -> None:
        devices = [{"index": i, "name": name, "capability": capability, "sms": 132} for i, (name, capability) in enumerate(gpus)]
        self.running: dict[tuple[int, Problem], str] = {}
        super().__init__(devices=lambda: devices, driver_version=lambda: (13, 0), candidates=_core.candidates)

    def set_plan(self, index: int, kernel: str, **problem: Any) -> None:
        if kernel == "gone":
            raise InvalidArgumentError("sparse_linear", "kernel", kernel, "one of ...")
        self.running[index, Problem(**problem)] = kernel


def test_a_machine_is_its_gpu_and_the_kernels_that_could_run() -> None:
    core = Core(("NVIDIA H200", (9, 0)), ("NVIDIA A100", (8, 0)))
    hopper, ampere = (Machine.of(core, device) for device in core.devices())  # type: ignore[arg-type]
    assert (hopper.gpu, hopper.driver, hopper.rtlynx) == ("NVIDIA H200", "13.0", _core.__version__)
    assert set(ampere.kernels) < set(hopper.kernels)
    e4m3 = [_core.candidates((9, 0), 132, 1, 64, 64, 0, dtype) for dtype in ("bfloat16_e4m3", "float16_e4m3")]
    assert all(names and set(names) <= set(hopper.kernels) - set(ampere.kernels) for names in e4m3)
    assert {"spmm_sm80_bf16_64x64x64_s4", "spmm_sm80_f16_64x64x64_s4"} <= set(ampere.kernels)


def test_all_gpus_of_a_kind_run_what_was_saved_for_it() -> None:
    core: Any = Core(("NVIDIA H200", (9, 0)), ("Tesla V100", (7, 0)), ("NVIDIA A100", (8, 0)), ("NVIDIA H200", (9, 0)))
    hopper = Machine.of(core, core.devices()[0])
    plans.save(hopper, {ATTENTION: "spmm_a", MLP: "spmm_b"})
    plans.use_saved(core)
    assert core.running == {(index, problem): kernel for index in (0, 3) for problem, kernel in plans.load(hopper).items()}


@pytest.mark.parametrize("entry", [{"kernel": "gone"}, {"problem": {"m": "64", "n": 64, "k": 64, "rank": 0}}])
def test_plans_that_cannot_be_used_are_ignored_with_a_warning(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    core: Any = Core(("NVIDIA H200", (9, 0)))
    machine = Machine.of(core, core.devices()[0])
    path = plans.save(machine, {ATTENTION: "spmm_a"})
    stored = json.loads(path.read_text())
    stored["plans"][0] |= entry
    path.write_text(json.dumps(stored))
    if "problem" in entry:  # what the extension says to a size that is no number
        monkeypatch.setattr(core, "set_plan", lambda index, m, **_: _core.set_plan(index, m, 64, 64, 0, "bfloat16", None))
    with pytest.warns(UserWarning, match="ignoring what is left"):
        plans.use_saved(core)


def test_without_a_driver_there_is_nothing_to_say() -> None:
    def devices() -> list[dict[str, Any]]:
        raise DeviceError("sparse_linear", "device", "a broken one", "a whole one")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.use_saved(SimpleNamespace(devices=devices))  # type: ignore[arg-type]
