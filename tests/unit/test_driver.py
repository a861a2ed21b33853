"""rtlynx._core against a pretended driver (fake_driver.c): what it refuses, in which words, and what it calls to launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtlynx import _core

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="builds a shared library with cc")
needs_device_code = pytest.mark.skipif(not _core.device_code()["targets"], reason="built without device code")

PROGRAM = """
import sys, types

# The package without its __init__, which would import torch: slow, and torch brings the real driver along.
sys.modules["rtlynx"] = types.ModuleType("rtlynx")
sys.modules["rtlynx"].__path__ = [{package!r}]
from rtlynx import _core
from rtlynx.errors import RTLynxError
A = 1 << 20

def sparsify(m=100, rank=96, device=1, k=128, activation="none", head_k=0, norm_rows=0, places=0):
    gated, branch, normed = activation == "silu_gate", A if rank else 0, activation == "norm"
    prologue = (activation, head_k, head_k + 8 if head_k else 0, k if gated else 0, norm_rows)
    inputs = (A, 2 * A if gated else 0, 3 * A if head_k else 0, A if normed else 0, A if normed else 0, 0)
    _core.sparsify(device, 0x5, "bfloat16", m, k, k, rank, *prologue, *inputs, 0, 0, places, branch, A, A, A, branch, True, 1e-8, 1.0)

def row_stats(m=100, k=128):
    _core.row_stats(1, 0x5, "float16", m, k, k, A, A, True, 1e-6)

def norm_rotary(tokens=4096, first_tokens=512, dim=128, first=A):
    strides = (0, 24 * dim, dim)
    weights, angles = (A, A), (A, A + 4)
    sizes = (1, tokens, first_tokens, 24, dim)
    _core.norm_rotary(1, 0x5, "bfloat16", *sizes, strides, strides, (dim, 2), A, first, *weights, *angles, A, 1e-6, 1e-6)

def sparse_linear(m=100, n=264, k=128, rank=0, dtype="float16"):
    branch, comp_up = (3 * A, 4 * A) if rank else (0, 0)
    _core.sparse_linear(0, 0x5, dtype, m, n, k, rank, A, A, 2 * A, 0, A, branch, comp_up, 0, A, "none", 0, 0, 0)

def fused_linear(m=100, n=264, k=128, rank=0):
    branch = A if rank else 0
    _core.fused_linear(0, 0x5, "bfloat16", m, n, k, k, rank, A, 0, 0, branch, A, branch, 0, branch, branch, A, True, True, 1e-8)

def parts(call):
    try:
        call()
    except RTLynxError as error:
        print(error.op, error.argument, error.got, error.expected, sep=" | ")

try:
    {statements}
except RTLynxError as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""

REFUSED = "DeviceError: sparse_linear: argument `device`: "


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pretended libcuda, under the name that is tried first."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", str(source), "-o", str(folder / "libcuda.so")], check=True)
    return folder


def run(driver: Path, statements: str, **settings: int) -> list[str]:
    """The lines that the statements print under this driver. A process of its own, because a driver is loaded once."""
    environment = os.environ | {f"FAKE_{name.upper()}": str(value) for name, value in settings.items()}
    environment["LD_LIBRARY_PATH"] = str(driver)
    program = PROGRAM.format(statements=statements, package=str(Path(_core.__file__).parent))
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_devices_are_described(driver: Path) -> None:
    (line,) = run(driver, "print(_core.driver_version(), _core.devices()[1])", capability=89)
    gpu = {"index": 1, "name": "Fake GPU", "capability": (8, 9), "sms": 132, "memory_bytes": 1 << 30, "memory_gb_s": 3352}
    assert line == f"(13, 0) {gpu}"


def test_a_driver_without_gpus_has_no_devices(driver: Path) -> None:
    devices, message = run(driver, "print(_core.devices()); sparsify()", init=100)
    assert devices == "[]"
    assert message.startswith(
        REFUSED.replace("sparse_linear", "sparsify") + "no usable NVIDIA driver: the driver library finds no GPU (CUDA_ERROR_NO_DEVICE)"
    )


@needs_device_code
def test_an_old_driver_is_refused_before_anything_is_loaded(driver: Path) -> None:
    *calls, message = run(driver, "sparse_linear()", version=12040)
    assert "load" not in calls and not any(call.startswith("launch") for call in calls)
    assert message.startswith(REFUSED + "the NVIDIA driver is too old: got a driver for CUDA 12.4, expected one for CUDA 13.0 or newer")


def test_errors_about_the_device_say_what_they_consist_of(driver: Path) -> None:
    (said,) = run(driver, "parts(sparsify)", init=100)
    assert said == "sparsify | device | the driver library finds no GPU (CUDA_ERROR_NO_DEVICE) | a usable NVIDIA driver"
    (said,) = run(driver, "parts(lambda: sparsify(activation='gelu_tanh'))", capability=89)
    assert said == "sparsify | device | compute capability 8.9 | compute capability 9.0 for an activation"
    (said,) = run(driver, "parts(_core.devices)", init=3)
    assert said == "devices | device | CUDA_ERROR_NOT_INITIALIZED (3) of cuInit | CUDA_SUCCESS"
    (said,) = run(driver, "parts(lambda: row_stats(k=100))")
    assert said.startswith("row_stats | k | 100 | ")


@needs_device_code
def test_errors_about_a_launch_say_what_they_consist_of(driver: Path) -> None:
    (said,) = [line for line in run(driver, "parts(sparse_linear)", version=12040) if " | " in line]
    assert said == "sparse_linear | device | a driver for CUDA 12.4 | one for CUDA 13.0 or newer"
    (said,) = [line for line in run(driver, "parts(fused_linear)", launch=719) if " | " in line]
    assert said == "fused_linear | device | CUDA_ERROR_LAUNCH_FAILED (719) of cuLaunchKernelEx | CUDA_SUCCESS"


@pytest.mark.skipif(bool(_core.device_code()["targets"]), reason="built with device code")
def test_a_build_without_device_code_says_so(driver: Path) -> None:
    *_, said = [line for line in run(driver, "parts(sparse_linear)", capability=80) if " | " in line]
    assert said.startswith("sparse_linear | device | a build that holds none at all | one that holds spmm_sm80_f16_")


@needs_device_code
def test_ptx_newer_than_the_driver_reads_as_an_old_driver(driver: Path) -> None:
    assert run(driver, "sparse_linear()", load=222)[-1].startswith(REFUSED + "the NVIDIA driver is too old")


@needs_device_code
@pytest.mark.parametrize(
    "settings, reason, refusal",
    [
        ({"version": 12040}, "driver supports CUDA 12.4, and the kernels need 13.0", "a driver for CUDA 12.4 | one for CUDA 13.0 or newer"),
        ({"capability": 75}, "compute capability 7.5, expected 8.0", "compute capability 7.5 | compute capability 8.0 or newer"),
        ({"capability": 90}, None, None),
    ],
)
def test_layers_and_info_say_beforehand_what_the_ops_will(
    driver: Path, settings: dict[str, int], reason: str | None, refusal: str | None
) -> None:
    """The extension decides it when it runs something, `usable` before that, for layers and for `rtlynx info`."""
    statements = (
        "import torch; from rtlynx import environment, launch",
        "print(launch.why_no_kernels(torch.device('cuda', 0)))",
        "seen = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: 2))",
        "gpu = environment._gpu(_core, seen, _core.devices()[0]); print(gpu.kernel or gpu.reason)",
        "parts(sparse_linear)",
    )
    of_layers, of_info, *lines = run(driver, "; ".join(statements), **settings)
    refused = [line for line in lines if line.startswith("sparse_linear | device | ")]
    if reason is None:
        assert of_layers == "None" and of_info.startswith("spmm_sm90_bf16_") and not refused
    else:
        assert reason in of_layers and reason in of_info
        assert refused == [f"sparse_linear | device | {refusal}"]


@pytest.mark.parametrize("op", ["sparsify", "sparse_linear", "fused_linear"])
def test_an_old_gpu_is_refused(driver: Path, op: str) -> None:
    (message,) = run(driver, f"{op}()", capability=75)
    assert message.startswith(f"DeviceError: {op}: argument `device`: got a GPU of compute capability 7.5, expected 8.0 or newer")


def test_an_absent_device_is_refused(driver: Path) -> None:
    (message,) = run(driver, "sparsify(device=2)")
    assert message == "InvalidArgumentError: sparsify: argument `device_index`: got 2, expected a GPU index below 2"


@needs_device_code
def test_a_launch_loads_once_and_leaves_the_thread_as_it_was(driver: Path) -> None:
    launch = "launch 8x2x1 of 256x1x1, 32768 bytes, stream 0x5, first pointer 0x100000"
    assert run(driver, "sparsify(); sparsify()", capability=80) == [
        *["retain", "push", "capture relaxed", "load", "sparsify_bf16_r64", "capture restored", launch, "pop"],
        *["push", launch, "pop"],
    ]


@needs_device_code
def test_every_device_loads_its_own_code(driver: Path) -> None:
    calls = run(driver, "sparsify(device=0); sparsify(device=1); sparsify(device=0, rank=0)")
    assert calls.count("load") == 2 and calls.count("retain") == 2


@needs_device_code
def test_the_grid_covers_a_ragged_problem(driver: Path) -> None:
    (launch,) = [line for line in run(driver, "sparse_linear()") if line.startswith("launch")]
    assert launch.startswith("launch 3x1x1 of 384x1x1, 196736 bytes")  # 128 x 128 tiles: 1 of M = 100, 3 of N = 264


TUNED = "_core.set_plan(0, 100, 264, 128, 0, 'float16', {kernel!r})"
ASKED = "print(_core.gemm_kernel(0, 100, 264, 128, 0, 'float16'))"


@needs_device_code
def test_a_tuned_kernel_is_launched_until_it_is_taken_back(driver: Path) -> None:
    kernel, planned = "spmm_sm80_f16_128x64x64_s4", "spmm_sm90_f16_128x128x64_s8"
    calls = run(driver, f"{TUNED.format(kernel=kernel)}; {ASKED}; sparse_linear(); {TUNED.format(kernel=None)}; {ASKED}; sparse_linear()")
    assert [call for call in calls if call.startswith("spmm")] == [kernel] * 2 + [planned] * 2
    assert [call.split(",")[0] for call in calls if call.startswith("launch")] == [
        "launch 5x1x1 of 128x1x1",  # 128 x 64 tiles: 1 of M = 100, 5 of N = 264
        "launch 3x1x1 of 384x1x1",
    ]


@needs_device_code
def test_a_tuned_kernel_is_for_its_problem_only(driver: Path) -> None:
    tuned = TUNED.format(kernel="spmm_sm80_f16_128x128x64_s4")
    calls = run(driver, f"{tuned}; sparse_linear(m=101); sparse_linear(rank=16)")
    assert [call for call in calls if call.startswith("spmm")] == ["spmm_sm90_f16_128x128x64_s8"]


def test_only_the_kernels_this_gpu_uses_are_tuned(driver: Path) -> None:
    """On a GPU that has kernels of its own: they are passed over while only the portable ones run."""
    portable = "_core.use_portable_kernels(True)"
    assert run(driver, f"{TUNED.format(kernel='spmm_sm90_f16_256x192x64_s5')}; {ASKED}; {portable}; {ASKED}") == [
        *["spmm_sm90_f16_256x192x64_s5", "spmm_sm80_f16_64x64x64_s4"]
    ]
    for capability, got in ((80, "spmm_sm90_f16_256x192x64_s5"), (90, "spmm_sm80_bf16_64x64x64_s4")):
        (message,) = run(driver, TUNED.format(kernel=got), capability=capability)
        assert message.startswith(f"InvalidArgumentError: sparse_linear: argument `kernel`: got {got}, expected one of spmm_sm")
        assert "spmm_sm80_f16_64x64x64_s4" in message
    (message,) = run(driver, TUNED.replace("(0, 100", "(2, 100").format(kernel=None))
    assert message == "InvalidArgumentError: sparse_linear: argument `device_index`: got 2, expected a GPU index below 2"


@needs_device_code
@pytest.mark.parametrize(
    "m, k, blocks, cluster",  # a cluster for every 64 rows; attribute 4 is its size
    [(100, 128, 2, ""), (100, 320, 4, ", attribute 4: 2x1x1"), (4608, 3072, 216, ", attribute 4: 3x1x1")],
)
def test_hopper_sparsifies_in_clusters(driver: Path, m: int, k: int, blocks: int, cluster: str) -> None:
    *_, symbol, _, x, comp_down, launch, _ = run(driver, f"sparsify(m={m}, k={k})")
    assert symbol == "sparsify_sm90_bf16_r64"
    assert x.startswith(f"map 0x100000: type 9, rank 2, {k}x{m}, stride {2 * k}, box 64x64 of")
    assert comp_down.startswith("map 0x100000: type 9")
    assert launch == f"launch {blocks}x2x1 of 288x1x1, 98304 bytes, stream 0x5, first pointer 0x100000{cluster}"


@needs_device_code
@pytest.mark.parametrize("activation, head_k, bytes", [("gelu_tanh", 0, 98304), ("gelu_tanh", 64, 98304), ("silu_gate", 128, 98304)])
def test_hopper_maps_what_x_is_made_of(driver: Path, activation: str, head_k: int, bytes: int) -> None:
    calls = run(driver, f"sparsify(k=320, activation={activation!r}, head_k={head_k})")
    assert f"sparsify_sm90_bf16_r64_{activation}" in calls
    maps = [call.split(" of ")[0] for call in calls if call.startswith("map") and "rank 2" in call]
    wanted = [f"map 0x100000: type 9, rank 2, {320 - head_k}x100, stride 640, box 64x64"]
    if head_k:
        wanted.append(f"map 0x300000: type 9, rank 2, {head_k}x100, stride {2 * (head_k + 8)}, box 64x64")
    if activation == "silu_gate":
        wanted.append(f"map 0x200000: type 9, rank 2, {320 - head_k}x100, stride 640, box 64x64")
    assert maps == wanted
    assert f"{bytes} bytes" in next(call for call in calls if call.startswith("launch"))


@needs_device_code
def test_hopper_maps_pieces_where_channels_are_gathered(driver: Path) -> None:
    calls = run(driver, "sparsify(k=320, activation='silu_gate', head_k=64, places=4 * A)")
    assert "sparsify_sm90_bf16_r64_silu_gate_gathered" in calls
    boxes = [call.split(" of ")[0].split("box ")[1] for call in calls if call.startswith("map") and "rank 2" in call]
    assert boxes == ["16x64"] * 3


@needs_device_code
def test_gathered_channels_have_kernels_and_memory_of_their_own(driver: Path) -> None:
    calls = run(driver, "sparsify(rank=16, places=4 * A)", capability=80)
    assert "sparsify_bf16_r16_gathered" in calls and "16384 bytes" in calls[-2]


def test_an_activation_is_refused_where_no_kernel_does_it(driver: Path) -> None:
    assert run(driver, "print(_core.activations(0))") == ["['none', 'gelu_tanh', 'silu_gate', 'norm']"]
    listed, refused = run(driver, "print(_core.activations(0)); sparsify(activation='gelu_tanh')", capability=89)
    assert listed == "['none', 'norm']"
    assert refused.startswith(
        "DeviceError: sparsify: argument `device`: got an activation on a GPU of compute capability 8.9, expected compute capability 9.0"
    )
    (message,) = run(driver, "sparsify(activation='relu')")
    assert message == "InvalidArgumentError: sparsify: argument `activation`: got relu, expected none, gelu_tanh, silu_gate, norm"


def test_a_norm_that_does_not_fit_is_refused(driver: Path) -> None:
    (message,) = run(driver, "sparsify(activation='norm', norm_rows=30)")
    assert message == "InvalidArgumentError: sparsify: argument `norm_rows`: got 30, expected a positive divisor of m = 100"
    (message,) = run(driver, "row_stats(k=100)")
    assert message.startswith("InvalidArgumentError: row_stats: argument `k`: got 100")


@needs_device_code
@pytest.mark.parametrize("capability, family", [(90, "sparsify_sm90"), (80, "sparsify")])
def test_norms_have_kernels_everywhere(driver: Path, capability: int, family: str) -> None:
    calls = run(driver, "sparsify(activation='norm', norm_rows=50); row_stats()", capability=capability)
    assert f"{family}_bf16_r64_norm" in calls and "row_stats_f16" in calls
    assert [call for call in calls if call.startswith("launch")][-1].startswith("launch 25x1x1 of 128x1x1, 0 bytes")


@needs_device_code
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_heads_are_divided_among_blocks(driver: Path, capability: int) -> None:
    calls = run(driver, "norm_rotary(); norm_rotary(tokens=0, first_tokens=0)", capability=capability)
    assert "norm_rotary_bf16_d128" in calls
    assert [call.split(" of ")[0] for call in calls if call.startswith("launch")] == ["launch 288x3x1"]


def test_heads_that_do_not_fit_are_refused(driver: Path) -> None:
    said = run(driver, "parts(lambda: norm_rotary(dim=260)); parts(lambda: norm_rotary(first=0))")
    assert said[0].startswith("norm_rotary | dim | 260 | ") and said[1] == "norm_rotary | first | no tensor | a tensor"


@needs_device_code
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_gpus_get_no_clusters(driver: Path, capability: int) -> None:
    calls = run(driver, "sparsify(m=4608, k=3072)", capability=capability)
    assert "sparsify_bf16_r64" in calls
    assert not any("attribute" in call for call in calls)


@needs_device_code
@pytest.mark.parametrize("capability", [80, 90])
def test_one_kernel_has_blocks_for_the_branch(driver: Path, capability: int) -> None:
    without, with_branch = (run(driver, f"fused_linear(rank={rank})", capability=capability)[-3:-1] for rank in (0, 80))
    assert without[-1] == "launch 10x1x1 of 128x1x1, 65536 bytes, stream 0x5, first pointer 0x100000"  # as above
    assert with_branch[-1] == without[-1].replace("10x1x1", "14x1x1")  # 2 of M = 100, 2 of rank 80
    assert "fused_sm80_bf16_64x64x64_s4" in run(driver, "fused_linear()", capability=capability)


HOPPER = "sparse_linear(m=4000, n=3080, k=2432, rank={rank}, dtype='bfloat16')"


@needs_device_code
def test_hopper_gets_a_map_of_every_operand(driver: Path) -> None:
    calls = run(driver, f"{HOPPER.format(rank=48)}; {HOPPER.format(rank=48)}")
    fixed = "of strides 1 1, interleave 0, swizzle {}, promotion 2, fill 0"
    call = [
        f"map 0x100000: type 9, rank 2, 1216x4000, stride 2432, box 32x192 {fixed.format(2)}",
        f"map 0x200000: type 9, rank 2, 2432x3080, stride 4864, box 64x192 {fixed.format(3)}",
        f"map 0x300000: type 9, rank 2, 48x4000, stride 96, box 32x192 {fixed.format(2)}",
        f"map 0x400000: type 9, rank 2, 48x3080, stride 96, box 32x192 {fixed.format(2)}",
        "launch 132x1x1 of 512x1x1, 221280 bytes, stream 0x5, first pointer 0x100000",  # the first map begins with its address
        "pop",
    ]
    loading = ["retain", "push", "capture relaxed", "load", "spmm_sm90_bf16_192x192x64_s6", "capture restored"]
    assert calls == [*loading, *call, "push", *call]


@needs_device_code
def test_the_widest_tiles_start_before_selection_has_finished(driver: Path) -> None:
    wide = HOPPER.format(rank=0).replace("3080", "12288")
    (launch,) = [line for line in run(driver, wide) if line.startswith("launch")]
    assert launch == "launch 132x1x1 of 384x1x1, 204880 bytes, stream 0x5, first pointer 0x100000, attribute 6: 1x0x0"


@needs_device_code
def test_hopper_without_a_branch_maps_none(driver: Path) -> None:
    calls = run(driver, HOPPER.format(rank=0).replace("bfloat16", "float16"))
    assert [call.split(", rank")[0] for call in calls if call.startswith("map")] == ["map 0x100000: type 6", "map 0x200000: type 6"]


@needs_device_code
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_gpus_get_no_maps(driver: Path, capability: int) -> None:
    calls = run(driver, HOPPER.format(rank=64), capability=capability)
    assert any(call.startswith("spmm_sm80_bf16") for call in calls)
    assert not any(call.startswith("map") for call in calls)


@needs_device_code
def test_a_refused_map_is_named_and_nothing_is_launched(driver: Path) -> None:
    *calls, popped, message = run(driver, HOPPER.format(rank=64), encode=1)
    assert popped == "pop" and not any(call.startswith("launch") for call in calls)
    assert message == REFUSED + "cuTensorMapEncodeTiled failed with CUDA_ERROR_INVALID_VALUE (CUDA error 1)"


@needs_device_code
def test_an_old_driver_is_refused_before_it_is_asked_for_a_map(driver: Path) -> None:
    *calls, message = run(driver, HOPPER.format(rank=64), version=11080)
    assert not any(call.startswith("map") for call in calls)
    assert message.startswith(REFUSED + "the NVIDIA driver is too old: got a driver for CUDA 11.8")


@needs_device_code
def test_a_failed_launch_is_named(driver: Path) -> None:
    *_, popped, message = run(driver, "sparse_linear()", launch=719)
    assert popped == "pop"
    assert message == REFUSED + "cuLaunchKernelEx failed with CUDA_ERROR_LAUNCH_FAILED (CUDA error 719)"


def test_no_rows_launch_nothing(driver: Path) -> None:
    assert run(driver, "sparsify(m=0); sparse_linear(m=0); fused_linear(m=0)") == []
