"""
Device code, dispatch and launch of rtlynx. Private: use `rtlynx.ops` and the layers above it.
"""

from typing import Final, SupportsFloat, SupportsIndex

__all__ = ["K_MULTIPLE", "MAX_RANK", "N_MULTIPLE", "RANK_MULTIPLE", "__version__", "device_code", "devices", "driver_version", "plan_sparse_linear", "sparse_linear", "sparsify", "use_portable_kernels"]

K_MULTIPLE: Final[int]
MAX_RANK: Final[int]
N_MULTIPLE: Final[int]
RANK_MULTIPLE: Final[int]
__version__: Final[str]

def device_code() -> "dict[str, object]":
    """
    What was built in: targets (["sm_80", ...]), nvcc ("13.0.88") and min_driver ((13, 0), the CUDA version the driver must support).

    A build without device code has no targets and None for the rest.
    """

def devices() -> "list[dict[str, object]]":
    """
    The GPUs in the order of cuda:0, cuda:1, ...: index, name, capability, sms, memory_bytes. Empty without a driver.
    """

def driver_version() -> tuple[int, int] | None:
    """
    CUDA version of the driver as (major, minor); None on a machine without one.
    """

def plan_sparse_linear(capability: tuple[SupportsIndex, SupportsIndex], sms: SupportsIndex, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str) -> str:
    """
    The GEMM kernel for a problem on a GPU of this compute capability; needs no GPU.

    Raises InvalidArgumentError for sizes the format cannot hold, DeviceError for a GPU without sparse tensor cores.
    """

def sparse_linear(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, values: SupportsIndex, metadata: SupportsIndex, weight: SupportsIndex, row_scale: SupportsIndex, branch: SupportsIndex, comp_up: SupportsIndex, bias: SupportsIndex, out: SupportsIndex) -> None:
    """
    Enqueue the sparse GEMM with row scale, branch and bias. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """

def sparsify(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, k: SupportsIndex, ldx: SupportsIndex, rank: SupportsIndex, x: SupportsIndex, score: SupportsIndex, shift: SupportsIndex, comp_down: SupportsIndex, values: SupportsIndex, metadata: SupportsIndex, row_scale: SupportsIndex, branch: SupportsIndex, branch_of_dropped: bool, eps: SupportsFloat | SupportsIndex) -> None:
    """
    Enqueue selection, compression, row norms and the branch's projection. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """

def use_portable_kernels(enabled: bool) -> bool:
    """
    Run the kernels that every GPU from compute capability 8.0 on has, in the whole process, or stop doing so; returns what was set before.

    For tests and comparisons on a GPU that has kernels of its own.
    """
