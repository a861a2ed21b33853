"""GPU tests: skipped, with the reason, where there is no usable GPU; every tensor they allocate starts poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from rtlynx import fp8, into, launch
from rtlynx.fusions import norms, rotary


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device: run `nox -s test_gpu` on a machine with an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}, the kernels need 8.0"
    from rtlynx import _core

    return None if _core.device_code()["targets"] else "rtlynx was built without device code (RTLYNX_NO_DEVICE_CODE)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run the I-th of N shares of the tests, each a mixture of all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    share, shares = map(int, config.getoption("--shard", "1/1").split("/"))
    if shares > 1:
        mixed = sorted(items, key=lambda item: crc32(item.nodeid.encode()))
        items[:] = mixed[share - 1 :: shares]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(mixed) if i % shares != share - 1])
    mine = [item for item in items if here in item.path.parents]
    reason = _why_not() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh allocations read as NaN (floats) or all ones (integers), so that an element nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def only_where_fp8_runs(request: pytest.FixtureRequest) -> None:
    """Tests with e4m3 operands run on the kernels that multiply them."""
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if arguments.get("values_dtype") is torch.float8_e4m3fn:
        if reason := fp8.missing_kernels(torch.device("cuda", torch.cuda.current_device())):
            pytest.skip(reason)
        if arguments.get("kernels") == "portable":
            pytest.skip("the kernels that every GPU can run do not multiply fp8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["native", "portable"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs on the kernels this GPU is given, and again on those that every GPU can run."""
    from rtlynx import _core

    if request.param == "portable" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU runs the portable kernels anyway")
    before = _core.use_portable_kernels(request.param == "portable")
    yield request.param
    _core.use_portable_kernels(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the functions that save passes between layers ran; of `rtlynx.norm_rotary` the launch, which compiled code calls too."""
    seen: list[str] = []

    def watch(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watching)

    watch(launch, "norm_rotary")
    watch(into, "norm_rotary_cuda")
    watch(rotary, "rotated")
    watch(norms, "_modulated")
    watch(torch, "addcmul")
    return seen
