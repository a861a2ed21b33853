"""Every task of the project, one session each: ``nox -l`` lists them, ``nox -s test`` runs one.

The sessions that run the package share one virtual environment, ``.nox/rtlynx``, because torch is several gigabytes: the first one
installs it, the others find it there. Arguments after ``--`` go to the session's main command: ``nox -s test -- -k sparsify``.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["test"]

HOME = Path(".nox/rtlynx").resolve()
BIN = HOME / "bin"
TOOLCHAIN = Path(".nox/nvcc").resolve()
"""nvcc from PyPI, away from torch, which pins other releases of the same CUDA wheels."""
SANITIZED = Path(".nox/sanitize").resolve()
SANITIZERS_PER_GPU = 4
SANITIZED_TESTS = {
    "sparsify": 8,
    "places": 4,
    "sparsify_norm": 3,
    "norm_rotary": 1,
    "sparse_linear": 1,
    "every_kernel": 2,
    "epilogue": 3,
    "fused_linear": 2,
    "probe": 1,
    "direct": 1,
}
"""Files of kernel tests that run under every tool, and among how many runs each is shared."""
OLDEST_TORCH = "2.8"
"""Older ones cannot compile a block for a changing number of tokens; eager they work, down to what pyproject.toml says."""
PYTHON_FILES = ("python", "tests", "examples", "noxfile.py")


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Make images with a small diffusion transformer, dense and sparse side by side."""
    install(session, strict=False)
    run(session, "rtlynx", "info")
    run(session, "rtlynx", "demo", *session.posargs)


@nox.session(venv_backend="none")
def test(session: nox.Session) -> None:
    """Everything that needs no GPU: lint, Rust and Python tests, all device code compiled without a warning or a spill."""
    require_rust(session, "fmt", "clippy")
    install(session, "[dev]")
    check_style(session)
    run(session, "cargo", "test", "--workspace", "--locked")
    run(session, "pytest", "tests/unit", "tests/integration", *session.posargs)


@nox.session(venv_backend="none")
def test_gpu(session: nox.Session) -> None:
    """The kernels against the reference, on this machine's GPU."""
    install(session, "[dev]")
    run(session, "pytest", "tests/gpu", *session.posargs)


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """The GPU tests under compute-sanitizer: accesses out of bounds; for the kernels also races and reads of what was never written.

    Most runs look at this project's kernels only. Reads of memory never written are found only where every kernel's writes are seen, so
    there all are looked at, and the whole models are left out: other libraries' kernels write in ways the tool does not see. In a few tests
    races are looked for in all kernels: racecheck ends torch's bf16 products, which they need, with an illegal access where it is told to
    leave them out. With backtraces of the host tensors stay alive, until no other run fits on the GPU.
    Full-size layers are left out of all: under the sanitizer they would take hours. Runs go side by side, on all GPUs that there are, since
    each waits for its host most of the time; a file of many tests is shared among several. Their output is in .nox/sanitize.
    """
    install(session, "[dev]")
    sanitizer = compute_sanitizer(session)
    ours = [
        option for name in ("sparsify", "row_stats", "norm_rotary", "spmm", "fused", "probe") for option in ("--kernel-name", f"kns={name}")
    ]
    ops = {name: f"tests/gpu/test_{name}.py" for name in SANITIZED_TESTS}
    # Those that multiply densely too, by torch.
    dense = [
        f"{ops['fused_linear']}::test_gradients_match_the_reference",
        *(f"{ops[name]}::test_a_layer" for name in ("places", "epilogue")),
    ]
    runs = {"racecheck-dense": ("racecheck", [], ["-k", "test_gradients_match_the_reference or test_a_layer", *ops.values()])}

    def share(name: str, among: int, tool: str, kernels: list[str], tests: list[str]) -> None:
        for i in range(among):
            runs[f"{tool}-{name}-{i + 1}"] = tool, kernels, [*tests, f"--shard={i + 1}/{among}"]

    share("others", 4, "memcheck", ours, ["tests/gpu", *(f"--ignore={tests}" for tests in ops.values())])
    for name, tests in ops.items():
        share(name, SANITIZED_TESTS[name], "racecheck", ours, [tests, *(f"--deselect={test}" for test in dense)])
        share(name, SANITIZED_TESTS[name], "initcheck", [], [tests])
        share(name, SANITIZED_TESTS[name], "memcheck", ours, [tests])
    SANITIZED.mkdir(parents=True, exist_ok=True)
    places: queue.Queue[int] = queue.Queue()
    for gpu in list(range(gpu_count())) * SANITIZERS_PER_GPU:
        places.put(gpu)

    def failed(name: str) -> bool:
        tool, kernels, tests = runs[name]
        options = ("--tool", tool, "--show-backtrace", "device", "--error-exitcode", "1", "--target-processes", "all", *kernels)
        gpu = places.get()
        try:
            with (SANITIZED / f"{name}.log").open("w") as output:
                pytest = ("python", "-m", "pytest", *tests, "-m", "not large", *session.posargs)
                env = {"CUDA_VISIBLE_DEVICES": str(gpu)}
                run(session, sanitizer, *options, *pytest, env=env, stdout=output, stderr=subprocess.STDOUT, log=False)
        except nox.command.CommandFailed:
            return True
        finally:
            places.put(gpu)
        return False

    with ThreadPoolExecutor(places.qsize()) as pool:
        unclean = [name for name, bad in zip(runs, pool.map(failed, runs), strict=True) if bad]
    if unclean:
        session.error(f"compute-sanitizer or a test under it failed: {', '.join(unclean)}; see {SANITIZED}")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Time the layer, its parts and its peers on this machine's GPU; figures and pictures go to benches/results."""
    install(session, "[bench]", strict=False)
    shapes = ("--shapes", "dit", "--shapes", "small", "--shapes", "odd")
    run(session, "rtlynx", "bench", "gemm", *shapes, "--out", "benches/results", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Format, style, types and the generated stub. Part of `test`."""
    require_rust(session, "fmt", "clippy")
    install(session, "[dev]")
    check_style(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """The Python tests that need no GPU, with the oldest torch under which all of them pass, in an environment of its own."""
    session.install(f"torch=={OLDEST_TORCH}.*", ".[test]", env={"RTLYNX_NO_DEVICE_CODE": "1"})
    session.run("pytest", "tests/unit", "tests/integration", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """The sdist, and the wheel made from it, in dist/; the wheel is then installed and used in environments of their own.

    One of them has another version of Python, if the machine has one: the wheel is meant to serve all.
    """
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist")  # makes the wheel from the sdist, so both are known to build
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    (wheel,) = Path("dist").resolve().glob("*.whl")
    use_wheel(session, "python", wheel)
    if other := other_python():
        use_wheel(session, other, wheel)
    else:
        session.log("the wheel was not tried with another version of Python: this machine has none with venv")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, in site/; a warning is an error. Reads the sources without importing them, so nothing is compiled."""
    session.install("mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff")
    session.run("mkdocs", *(session.posargs or ("build", "--strict")))


def run(
    session: nox.Session, program: str, *arguments: str, strict: bool = True, env: dict[str, str] | None = None, **options: Any
) -> None:
    """Run a program of the shared environment, or one that it finds on PATH, with more environment variables.

    All programs see the same build variables, so that cargo has no reason to compile anything twice.
    """
    search = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    path = shutil.which(program, path=search) or session.error(f"{program} is neither in {BIN} nor on PATH")
    build = {"NVCC": nvcc(session), "PYO3_PYTHON": str(BIN / "python"), "RTLYNX_STRICT": "1" if strict else "0"}
    session.run(str(path), *arguments, env={"PATH": search, "VIRTUAL_ENV": str(HOME), **build, **(env or {})}, external=True, **options)


def install(session: nox.Session, extra: str = "", *, strict: bool = True) -> None:
    """Install the working tree, editable; compiles the Rust extension and the kernels."""
    require_rust(session)
    if not BIN.is_dir():
        session.run(sys.executable, "-m", "venv", str(HOME), external=True)
    _, backend = build_requirements()
    run(session, "python", "-m", "pip", "install", *backend)
    run(session, "python", "-m", "pip", "install", "--no-build-isolation", "-e", f".{extra}", strict=strict)


def require_rust(session: nox.Session, *commands: str) -> None:
    """End the session, before it has taken minutes, where cargo or one of these commands of it is missing."""
    if shutil.which("cargo") is None:
        oldest_rust = nox.project.load_toml("Cargo.toml")["workspace"]["package"]["rust-version"]
        session.error(f"rtlynx is partly Rust: install Rust {oldest_rust} or newer first (https://rustup.rs)")
    components = {"fmt": "rustfmt", "clippy": "clippy"}
    # Asked for its version, since rustup has a program of that name in any case.
    unusable = [name for name in commands if subprocess.run(["cargo", name, "--version"], capture_output=True, check=False).returncode]
    if unusable:
        missing = " ".join(components[name] for name in unusable)
        session.error(f"this Rust toolchain lacks {missing}: rustup component add {missing}")


def build_requirements() -> tuple[list[str], list[str]]:
    """What pyproject.toml needs to build: (the CUDA wheels, the rest)."""
    requirements = nox.project.load_toml("pyproject.toml")["build-system"]["requires"]
    cuda = [requirement for requirement in requirements if requirement.startswith("nvidia-")]
    return cuda, [requirement for requirement in requirements if requirement not in cuda]


def nvcc(session: nox.Session) -> str:
    """The compiler named by the variable NVCC, else the release that pyproject.toml pins, from PyPI."""
    if "NVCC" in os.environ:
        return os.environ["NVCC"]
    cuda, _ = build_requirements()
    installed = TOOLCHAIN / "requirements.txt"
    if not installed.is_file() or installed.read_text().splitlines() != cuda:
        session.run(sys.executable, "-m", "venv", "--clear", str(TOOLCHAIN), external=True)
        session.run(str(TOOLCHAIN / "bin" / "python"), "-m", "pip", "install", *cuda, external=True)
        installed.write_text("\n".join(cuda))
    (compiler,) = TOOLCHAIN.glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc")
    return str(compiler)


def other_python() -> str | None:
    """The oldest other version of Python on this machine that the package is for and that can make an environment."""
    for minor in range(10, 15):
        path = shutil.which(f"python3.{minor}")
        if path is None or sys.version_info[:2] == (3, minor):
            continue
        if subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0:
            return path
    return None


def use_wheel(session: nox.Session, python: str, wheel: Path) -> None:
    """Install the wheel in a new environment of this Python and run it, away from the source tree."""
    with tempfile.TemporaryDirectory() as folder:
        session.run(python, "-m", "venv", f"{folder}/venv", external=True)
        installed = f"{folder}/venv/bin/python"
        session.run(installed, "-m", "pip", "install", str(wheel), external=True)
        with session.chdir(folder):
            session.run(installed, "-m", "rtlynx.cli", "info", external=True)
            session.run(installed, "-c", "from rtlynx import _core; assert _core.device_code()['targets'], 'no device code'", external=True)


def check_style(session: nox.Session) -> None:
    """All linters, over Python and Rust."""
    run(session, "ruff", "check", *PYTHON_FILES)
    run(session, "ruff", "format", "--check", *PYTHON_FILES)
    run(session, "mypy")
    device_code = [*Path("cuda").rglob("*.cu*"), *Path("python").rglob("*.cu")]
    run(session, "clang-format", "--dry-run", "-Werror", *map(str, device_code))
    run(session, "cargo", "fmt", "--all", "--check")
    run(session, "cargo", "clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings")
    check_stub(session)


def check_stub(session: nox.Session) -> None:
    """The committed _core.pyi is what the Rust sources generate."""
    committed = Path("python/rtlynx/_core.pyi")
    with tempfile.TemporaryDirectory() as folder:
        run(session, "maturin", "generate-stubs", "--features", "stubs", "--out", folder)
        generated = [path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.pyi")]
    if generated != [committed.read_text(encoding="utf-8")]:
        session.error(f"{committed} is stale: regenerate it (CONTRIBUTING.md)")


def gpu_count() -> int:
    """How many GPUs there are; 1 where nobody can tell, so that what follows says what is missing."""
    tool = shutil.which("nvidia-smi")
    listed = "" if tool is None else subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def compute_sanitizer(session: nox.Session) -> str:
    """The one on PATH, else the one in NVIDIA's wheel."""
    if found := shutil.which("compute-sanitizer"):
        return found
    run(session, "python", "-m", "pip", "install", "nvidia-cuda-sanitizer-api")
    (program,) = HOME.glob("lib/python*/site-packages/nvidia/cu*/bin/compute-sanitizer")
    return str(program)
