"""The build script of rtlynx-core: which nvcc it takes, what it says without one, what strictness refuses.

The script has no dependencies, so rustc compiles it alone, and each test runs it as cargo would, on a source tree of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CRATE = Path(__file__).parents[2] / "crates" / "rtlynx-core"

PLAIN = 'extern "C" __global__ void plain(float* out) { out[threadIdx.x] = 2.0f; }\n'
HOPPER = 'extern "C" __global__ void hopper() { asm volatile("wgmma.fence.sync.aligned;"); }\n'  # exists on sm_90a only
SPILL = """
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const float* in, float* out) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = x[i] * x[95 - i];
}
"""
UNUSED = 'extern "C" __global__ void unused(float* out) { int nothing; out[0] = 1.0f; }\n'


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled build script."""
    rustc = shutil.which("rustc")
    if rustc is None or not CRATE.is_dir():
        pytest.skip("needs rustc and the source tree")
    binary = tmp_path_factory.mktemp("build-script") / "build"
    subprocess.run([rustc, "--edition", "2024", str(CRATE / "build.rs"), "-o", str(binary)], check=True)
    return binary


class Build:
    """A source tree with kernels of its own, and an environment without any nvcc."""

    def __init__(self, script: Path, root: Path) -> None:
        self.script, self.root, self.out = script, root, root / "out"
        self.crate, self.kernels, self.tools = root / "crates" / "core", root / "cuda" / "kernels", root / "tools"
        for folder in (self.crate, self.kernels, root / "cuda" / "include", self.tools, self.out):
            folder.mkdir(parents=True)

    def program(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def fake_nvcc(self, path: Path, version: str) -> Path:
        """Answers --version, and "compiles" by creating the file after -o."""
        compile_ = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
        return self.program(path, f'if [ "$1" = --version ]; then echo "release, V{version}"; else {compile_}; fi')

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        # Only our own tools are on PATH: neither the machine's nvcc nor its Python is found there.
        base = {"PATH": str(self.tools), "CARGO_MANIFEST_DIR": str(self.crate), "OUT_DIR": str(self.out)}
        return subprocess.run([self.script], env=base | environment, capture_output=True, text=True)

    def device_code(self) -> str:
        return (self.out / "device_code.rs").read_text()


@pytest.fixture
def build(script: Path, tmp_path: Path) -> Build:
    build = Build(script, tmp_path)
    (build.kernels / "plain.cu").write_text(PLAIN)
    return build


def test_without_nvcc_the_build_fails_and_names_the_places_tried(build: Build, tmp_path: Path) -> None:
    result = build.run(CUDA_HOME=str(tmp_path / "toolkit"))
    assert result.returncode != 0
    places = ["NVCC: not set", f"CUDA_HOME={tmp_path / 'toolkit'}", "CUDA_PATH: not set", "PATH: no nvcc", "PyPI wheels of python3"]
    positions = [result.stderr.find(place) for place in places]
    assert -1 not in positions and positions == sorted(positions), result.stderr
    assert "RTLYNX_NO_DEVICE_CODE=1" in result.stderr and "pip install" in result.stderr
    assert not (build.out / "device_code.rs").exists()


def test_the_wheels_it_names_are_those_that_pip_fetches(build: Build) -> None:
    wanted = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    wheels = re.findall(r'"(nvidia-[^;"]+)', wanted[: wanted.index("build-backend")])
    assert len(wheels) == 5
    assert set(re.findall(r'"(nvidia-[^"]+)"', build.run().stderr)) == set(wheels)


def test_no_device_code_needs_no_nvcc(build: Build) -> None:
    result = build.run(RTLYNX_NO_DEVICE_CODE="1")
    assert result.returncode == 0, result.stderr
    assert "NVCC: Option<&str> = None" in build.device_code() and "Image {" not in build.device_code()


@pytest.mark.parametrize("name", ["RTLYNX_NO_DEVICE_CODE", "RTLYNX_STRICT"])
def test_switches_are_zero_or_one(build: Build, name: str) -> None:
    build.fake_nvcc(build.tools / "nvcc", "13.0.1")
    result = build.run(**{name: "yes"})
    assert result.returncode != 0 and f'{name} must be 0 or 1, got "yes"' in result.stderr


def test_nvcc_is_searched_in_the_documented_order(build: Build, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel = build.fake_nvcc(site / "nvidia" / "cu13" / "bin" / "nvcc", "13.0.4")
    python = build.program(tmp_path / "python", f"echo {wheel}")  # what the real one prints for a sys.path with this folder on it
    path = build.fake_nvcc(build.tools / "nvcc", "13.0.3")
    build.fake_nvcc(tmp_path / "toolkit" / "bin" / "nvcc", "13.0.2")
    explicit = build.fake_nvcc(tmp_path / "explicit", "13.0.1")

    environment = {"NVCC": str(explicit), "CUDA_HOME": str(tmp_path / "toolkit"), "PYO3_PYTHON": str(python)}
    for version, take_away in [("13.0.1", "NVCC"), ("13.0.2", "CUDA_HOME"), ("13.0.3", "PATH"), ("13.0.4", "PYO3_PYTHON")]:
        result = build.run(**environment)
        assert result.returncode == 0, result.stderr
        assert f'Some("{version}")' in build.device_code()
        if take_away == "PATH":
            path.unlink()
        else:
            del environment[take_away]
    assert build.run(**environment).returncode != 0


def test_an_explicit_nvcc_that_does_not_work_is_not_replaced(build: Build, tmp_path: Path) -> None:
    build.fake_nvcc(build.tools / "nvcc", "13.0.3")
    result = build.run(NVCC=str(tmp_path / "absent"))
    assert result.returncode != 0 and f"NVCC={tmp_path / 'absent'}" in result.stderr


def test_an_nvcc_that_is_too_old_is_passed_over_and_listed(build: Build, tmp_path: Path) -> None:
    build.fake_nvcc(tmp_path / "toolkit" / "bin" / "nvcc", "12.3.107")
    build.fake_nvcc(build.tools / "nvcc", "9.2.148")
    found = build.fake_nvcc(tmp_path / "later" / "nvcc", "12.5.40")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), "PATH": f"{build.tools}{os.pathsep}{found.parent}"}
    result = build.run(**environment)
    assert result.returncode == 0, result.stderr
    assert 'Some("12.5.40")' in build.device_code()

    build.fake_nvcc(found, "12.4.131")
    result = build.run(**environment)
    assert result.returncode != 0
    places = [
        f"CUDA_HOME={tmp_path / 'toolkit'}: bin/nvcc is too old: 12.3",
        f"PATH: {build.tools / 'nvcc'} is too old: 9.2",
        f"PATH: {found} is too old: 12.4",
        "PyPI wheels of",
    ]
    positions = [result.stderr.find(place) for place in places]
    assert -1 not in positions and positions == sorted(positions), result.stderr
    assert "version 12.5 or newer" in result.stderr


def test_an_explicit_nvcc_that_is_too_old_is_not_replaced(build: Build, tmp_path: Path) -> None:
    build.fake_nvcc(build.tools / "nvcc", "13.0.3")
    explicit = build.fake_nvcc(tmp_path / "explicit", "12.3.107")
    result = build.run(NVCC=str(explicit))
    assert result.returncode != 0 and f"NVCC={explicit}: is too old: 12.3" in result.stderr


def test_the_wheels_nvcc_is_found_through_a_real_interpreter(build: Build, tmp_path: Path) -> None:
    """As under pip's build isolation, where PYTHONPATH leads to the requirements."""
    build.fake_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0.9")
    result = build.run(PYO3_PYTHON=sys.executable, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert 'Some("13.0.9")' in build.device_code()


# ---- with a real compiler: the one NVCC names, as in the test session


@pytest.fixture
def compiler(build: Build) -> dict[str, str]:
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc: set NVCC")
    return {"NVCC": nvcc, "PATH": os.environ["PATH"]}


def test_kernels_are_embedded_for_every_target(build: Build, compiler: dict[str, str]) -> None:
    (build.kernels / "hopper_sm90.cu").write_text(HOPPER)
    result = build.run(**compiler, RTLYNX_STRICT="1")
    assert result.returncode == 0, result.stderr
    hopper, plain = [line for line in build.device_code().splitlines() if "Image {" in line and "stem" in line]
    assert 'targets: &["sm_90a"]' in hopper and 'kernels: &["hopper"]' in hopper
    assert 'targets: &["sm_80", "compute_80", "sm_90a"]' in plain and 'kernels: &["plain"]' in plain
    assert (build.out / "plain.fatbin").stat().st_size > 0


def test_strict_builds_refuse_spills(build: Build, compiler: dict[str, str]) -> None:
    (build.kernels / "spill.cu").write_text(SPILL)
    assert build.run(**compiler).returncode == 0
    result = build.run(**compiler, RTLYNX_STRICT="1")
    assert result.returncode != 0 and "spill.cu" in result.stderr and "spill" in result.stderr.split("spill.cu", 1)[1]


def test_strict_builds_refuse_warnings(build: Build, compiler: dict[str, str]) -> None:
    (build.kernels / "unused.cu").write_text(UNUSED)
    assert build.run(**compiler).returncode == 0
    result = build.run(**compiler, RTLYNX_STRICT="1")
    assert result.returncode != 0 and "nothing" in result.stderr


def test_a_compile_error_names_the_file(build: Build, compiler: dict[str, str]) -> None:
    (build.kernels / "broken.cu").write_text("__global__ void broken() { return 1 }\n")
    result = build.run(**compiler)
    assert result.returncode != 0 and "nvcc failed on" in result.stderr and "broken.cu" in result.stderr
