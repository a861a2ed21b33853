"""rtlynx._core without a GPU: what it exports, what it plans, how it refuses."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtlynx import _core, checks, fp8, fused, reference
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.fp8 import kernel_dtype

H200 = ((9, 0), 132)
TENSOR = 1 << 20  # an aligned address that no test here ever dereferences

SPARSIFY: dict[str, Any] = dict(
    device_index=0, stream=0, dtype="bfloat16", m=64, k=128, ldx=128, rank=16, branch_of_dropped=True, eps=1e-8, values_scale=1.0,
    activation="none", head_k=0, ld_head=0, ld_gate=0, gate=0, head=0,
    norm_rows=0, norm_stats=0, norm_weight=0, norm_bias=0,
    x=TENSOR, score=0, shift=0, places=0, comp_down=TENSOR, values=TENSOR, metadata=TENSOR, row_scale=TENSOR, branch=TENSOR,
)  # fmt: skip
SPARSE_LINEAR: dict[str, Any] = dict(
    device_index=0, stream=0, dtype="bfloat16", m=64, n=64, k=128, rank=16,
    values=TENSOR, metadata=TENSOR, weight=TENSOR, weight_scale=0, row_scale=TENSOR, branch=TENSOR, comp_up=TENSOR, bias=TENSOR, out=TENSOR,
    activation="gelu_tanh", residual=2 * TENSOR, gate=4 * TENSOR, gates=4,
)  # fmt: skip

FUSED_LINEAR: dict[str, Any] = dict(
    device_index=0, stream=0, dtype="bfloat16", m=64, n=64, k=128, ldx=128, rank=16,
    branch_of_dropped=True, norm_compensation=True, eps=1e-8,
    x=TENSOR, score=0, shift=0, comp_down=TENSOR, weight=TENSOR, comp_up=TENSOR, bias=TENSOR, branch=TENSOR, progress=TENSOR, out=TENSOR,
)  # fmt: skip


def parts(error: DeviceError | InvalidArgumentError) -> tuple[str, str, str, str]:
    return error.op, error.argument, error.got, error.expected


def test_version_is_that_of_the_installed_package() -> None:
    assert _core.__version__ == importlib.metadata.version("rtlynx")


LIMITS = ("K_MULTIPLE", "N_MULTIPLE", "RANK_MULTIPLE", "MAX_RANK")
FORMAT = ("GROUP", "TILE_ROWS", "PADDED_ROWS", "BLOCK_COLS", "PIECE")


@pytest.mark.parametrize("name", [*LIMITS, *FORMAT])
def test_constants_are_those_of_the_reference(name: str) -> None:
    assert getattr(_core, name) == getattr(reference, name)


def test_padding_is_that_of_the_reference() -> None:
    metadata = reference.pack_metadata(reference.kept_positions(reference.keep_mask(torch.zeros(1, 64))))
    assert {word & 0xFFFFFFFF for word in metadata.unique().tolist()} == {_core.PADDING_WORD}


def test_what_python_prepares_for_the_kernels_is_what_they_count_on() -> None:
    assert _core.ALIGNMENT == checks.ALIGNMENT
    assert _core.COUNTED_ROWS == fused._COUNTED_ROWS


def test_the_kernels_serve_the_dtypes_that_the_checks_let_through() -> None:
    names = {kernel_dtype(dtype, values) for dtype in checks.KERNEL_DTYPES for values in (None, reference.E4M3)}
    for name in names:
        assert _core.candidates(*H200, 64, 64, 128, 0, name)
    with pytest.raises(InvalidArgumentError, match="`dtype`"):
        _core.candidates(*H200, 64, 64, 128, 0, kernel_dtype(torch.float32))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (9, 1), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_e4m3_has_kernels_where_layers_in_fp8_are_let_be(capability: tuple[int, int]) -> None:
    candidates = _core.candidates(capability, 132, 64, 64, 128, 0, "bfloat16_e4m3")
    assert bool(candidates) == (capability == fp8.CAPABILITY)


def test_device_code_is_complete_or_absent() -> None:
    code = _core.device_code()
    assert code.keys() == {"targets", "nvcc", "min_driver"}
    if code["nvcc"] is None:
        assert code == {"targets": [], "nvcc": None, "min_driver": None}
    else:
        assert code["targets"] == ["sm_80", "compute_80", "sm_90a"]
        assert code["min_driver"] == (int(str(code["nvcc"]).split(".")[0]), 0)


def test_devices_need_a_driver() -> None:
    if _core.driver_version() is None:
        assert _core.devices() == []
    for index, device in enumerate(_core.devices()):
        assert device.keys() == {"index", "name", "capability", "sms", "memory_bytes", "memory_gb_s"}
        assert device["index"] == index


@pytest.mark.parametrize("dtype, short", [("bfloat16", "bf16"), ("float16", "f16")])
def test_plan_names_a_kernel(dtype: str, short: str) -> None:
    assert _core.plan_sparse_linear(*H200, 4608, 12288, 3072, 64, dtype) == f"spmm_sm90_{short}_256x192x64_s5"


@pytest.mark.parametrize("capability, tile", [((8, 0), "256x128"), ((8, 9), "128x128"), ((10, 0), "256x128"), ((12, 0), "128x128")])
def test_hopper_kernels_are_planned_for_hopper_only(capability: tuple[int, int], tile: str) -> None:
    assert _core.plan_sparse_linear(capability, 132, 4096, 3072, 3072, 64, "bfloat16") == f"spmm_sm80_bf16_{tile}x64_s4"


def test_the_plan_is_one_of_the_candidates() -> None:
    for capability, count in (((9, 0), 9), ((8, 9), 3)):
        for problem in ((1, 8, 64, 0), (4608, 12288, 3072, 64)):
            candidates = _core.candidates(capability, 132, *problem, "float16")
            assert len(candidates) == count == len(set(candidates))
            assert _core.plan_sparse_linear(capability, 132, *problem, "float16") in candidates


def test_plan_depends_on_the_gpu_and_the_problem() -> None:
    problems = [(64, 64), (512, 3072), (4608, 12288)]
    plans = {
        _core.plan_sparse_linear(capability, sms, m, n, 3072, 0, "bfloat16")
        for capability, sms in [H200, ((8, 9), 24)]
        for m, n in problems
    }
    assert len(plans) > 1


@pytest.mark.parametrize("argument, got", [("m", -1), ("n", 12), ("k", 96), ("k", 0), ("rank", 8), ("rank", 144), ("dtype", "float32")])
def test_plan_refuses_problems_outside_the_format(argument: str, got: object) -> None:
    problem: dict[str, Any] = dict(m=64, n=64, k=128, rank=16, dtype="bfloat16")
    for ask in (_core.plan_sparse_linear, _core.candidates):
        with pytest.raises(InvalidArgumentError) as refusal:
            ask(*H200, **problem | {argument: got})
        assert (refusal.value.op, refusal.value.argument, refusal.value.got) == ("sparse_linear", argument, str(got))


def test_plan_refuses_gpus_without_sparse_tensor_cores() -> None:
    with pytest.raises(
        DeviceError, match=r"sparse_linear: argument `device`: got a GPU of compute capability 7\.5, expected 8\.0"
    ) as refusal:
        _core.plan_sparse_linear((7, 5), 40, 64, 64, 128, 0, "bfloat16")
    assert parts(refusal.value) == ("sparse_linear", "device", "compute capability 7.5", "compute capability 8.0 or newer")


def test_plan_refuses_e4m3_where_no_kernel_multiplies_it() -> None:
    with pytest.raises(DeviceError, match=r"got e4m3 operands on a GPU of compute capability 8\.9") as refusal:
        _core.plan_sparse_linear((8, 9), 128, 64, 64, 128, 0, "bfloat16_e4m3")
    assert parts(refusal.value) == ("sparse_linear", "device", "compute capability 8.9", "compute capability 9.0 for e4m3 operands")
    assert "precision=" not in str(refusal.value)  # what a layer is told about its configuration is rtlynx.fp8's to say


@pytest.mark.parametrize(
    "argument, got",
    [
        *[
            ("k", 96),
            ("ldx", 64),
            ("ldx", 130),
            ("rank", 17),
            ("eps", -1.0),
            ("dtype", "int8"),
            ("x", 0),
            ("x", TENSOR + 8),
            ("values_scale", 0.5),
            ("activation", "relu"),
            ("head_k", 64),
            ("gate", TENSOR),
            ("head", TENSOR),
        ],
        *[("score", TENSOR + 4), ("places", TENSOR + 8), ("comp_down", 0), ("branch", 0), ("values", 0), ("metadata", 0)],
    ],
)
def test_sparsify_refuses_before_it_asks_for_a_driver(argument: str, got: object) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        _core.sparsify(**SPARSIFY | {argument: got})
    assert (refusal.value.op, refusal.value.argument) == ("sparsify", argument)


@pytest.mark.parametrize(
    "argument, got",
    [
        ("n", 12),
        ("k", 96),
        ("rank", 17),
        ("dtype", "int8"),
        ("values", 0),
        ("weight", 0),
        ("weight", TENSOR + 2),
        ("comp_up", 0),
        ("out", 0),
        ("activation", "gelu"),
        ("activation", "silu_gate"),
        ("residual", 0),
        ("residual", TENSOR),  # that is out
        ("residual", 2 * TENSOR + 8),
        ("gate", 0),
        ("gate", 4 * TENSOR + 8),
        ("gates", 0),
        ("gates", 3),
    ],
)
def test_sparse_linear_refuses_before_it_asks_for_a_driver(argument: str, got: object) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        _core.sparse_linear(**SPARSE_LINEAR | {argument: got})
    assert (refusal.value.op, refusal.value.argument) == ("sparse_linear", "gate" if argument == "gates" else argument)


@pytest.mark.parametrize(
    "argument, got",
    [
        *[("m", -1), ("n", 12), ("k", 96), ("ldx", 64), ("ldx", 130), ("ldx", 1 << 31), ("rank", 17), ("eps", -1.0), ("dtype", "int8")],
        *[("x", 0), ("x", TENSOR + 8), ("score", TENSOR + 4), ("comp_down", 0), ("weight", 0), ("branch", 0), ("progress", 0), ("out", 0)],
    ],
)
def test_fused_linear_refuses_before_it_asks_for_a_driver(argument: str, got: object) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        _core.fused_linear(**FUSED_LINEAR | {argument: got})
    assert (refusal.value.op, refusal.value.argument) == ("fused_linear", argument)


def test_a_superfluous_branch_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`comp_down`: got a tensor, expected none: rank is 0"):
        _core.sparsify(**SPARSIFY | {"rank": 0})
    with pytest.raises(InvalidArgumentError, match="`comp_down`: got a tensor, expected none: rank is 0"):
        _core.fused_linear(**FUSED_LINEAR | {"rank": 0})


def test_no_rows_launch_nothing() -> None:
    _core.sparsify(**SPARSIFY | {"m": 0, "x": 0, "values": 0, "metadata": 0, "row_scale": 0, "branch": 0})
    _core.sparse_linear(**SPARSE_LINEAR | {"m": 0, "values": 0, "metadata": 0, "branch": 0, "out": 0})
    _core.fused_linear(**FUSED_LINEAR | {"m": 0, "x": 0, "branch": 0, "progress": 0, "out": 0})


@pytest.mark.skipif(_core.driver_version() is not None, reason="this machine has a driver")
@pytest.mark.parametrize(
    "op, call",
    [
        ("sparsify", lambda: _core.sparsify(**SPARSIFY)),
        ("sparse_linear", lambda: _core.sparse_linear(**SPARSE_LINEAR)),
        ("fused_linear", lambda: _core.fused_linear(**FUSED_LINEAR)),
        ("sparse_linear", lambda: _core.set_plan(0, 64, 64, 128, 0, "bfloat16", None)),
        ("sparse_linear", lambda: _core.gemm_kernel(0, 64, 64, 128, 0, "bfloat16")),
    ],
)
def test_a_missing_driver_is_named(op: str, call: Callable[[], object]) -> None:
    with pytest.raises(DeviceError, match="no usable NVIDIA driver: the driver library") as refusal:
        call()
    got = "the driver library (libcuda) is not on this machine"
    assert parts(refusal.value) == (op, "device", got, "a usable NVIDIA driver")


def test_the_extension_links_neither_torch_nor_cuda() -> None:
    if sys.platform != "linux":
        pytest.skip("reads an ELF file")
    assert _core.__file__ is not None
    libraries = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in libraries
    assert not any(name in libraries for name in ("torch", "cuda", "cudart", "python"))
