"""
Device code, dispatch and launch of rtlynx. Private: use `rtlynx.ops` and the layers above it.
"""

from typing import Final, SupportsFloat, SupportsIndex, final

__all__ = ["ALIGNMENT", "BLOCK_COLS", "COUNTED_ROWS", "GROUP", "K_MULTIPLE", "MAX_HEAD_DIM", "MAX_RANK", "N_MULTIPLE", "PADDED_ROWS", "PADDING_WORD", "PIECE", "RANK_MULTIPLE", "TILE_ROWS", "__version__", "Layer", "activations", "candidates", "device_code", "devices", "driver_version", "fused_linear", "gemm_kernel", "least_tokens", "norm_rotary", "plan_sparse_linear", "probe", "row_stats", "set_plan", "sparse_linear", "sparsify", "use_portable_kernels"]

ALIGNMENT: Final[int]
BLOCK_COLS: Final[int]
COUNTED_ROWS: Final[int]
GROUP: Final[int]
K_MULTIPLE: Final[int]
MAX_HEAD_DIM: Final[int]
MAX_RANK: Final[int]
N_MULTIPLE: Final[int]
PADDED_ROWS: Final[int]
PADDING_WORD: Final[int]
PIECE: Final[int]
RANK_MULTIPLE: Final[int]
TILE_ROWS: Final[int]
__version__: Final[str]

@final
class Layer:
    """
    What stays the same from one call of a layer to the next. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """
    def __new__(cls, /, device_index: SupportsIndex, dtype: str, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, score: SupportsIndex, shift: SupportsIndex, places: SupportsIndex, comp_down: SupportsIndex, weight: SupportsIndex, weight_scale: SupportsIndex, comp_up: SupportsIndex, bias: SupportsIndex, norm_compensation: bool, branch_of_dropped: bool, eps: SupportsFloat | SupportsIndex, values_scale: SupportsFloat | SupportsIndex) -> Layer: ...
    def multiply(self, /, stream: SupportsIndex, m: SupportsIndex, workspace: SupportsIndex, out: SupportsIndex) -> None:
        """
        Enqueue the product of what was selected into `workspace`, by this layer or by one that selects alike.
        """
    def run(self, /, stream: SupportsIndex, m: SupportsIndex, x: SupportsIndex, workspace: SupportsIndex, out: SupportsIndex) -> None:
        """
        Enqueue both.
        """
    def run_fused(self, /, stream: SupportsIndex, m: SupportsIndex, x: SupportsIndex, ldx: SupportsIndex, activation: str, gate: SupportsIndex, ld_gate: SupportsIndex, head: SupportsIndex, head_k: SupportsIndex, ld_head: SupportsIndex, workspace: SupportsIndex, residual: SupportsIndex, residual_gate: SupportsIndex, residual_gates: SupportsIndex, out: SupportsIndex) -> None:
        """
        Enqueue both, with what comes before the layer, as `sparsify` has it, and a gated sum after it, as `sparse_linear` does.
        """
    def select(self, /, stream: SupportsIndex, m: SupportsIndex, x: SupportsIndex, workspace: SupportsIndex) -> None:
        """
        Enqueue selection from m contiguous rows of x.
        """
    def workspace_bytes(self, /, m: SupportsIndex) -> int:
        """
        Bytes of the memory between selection and product for m rows.
        """

def activations(device_index: SupportsIndex) -> list[str]:
    """
    What `sparsify` can apply to x on this GPU: "none", "norm", and on some GPUs more.
    """

def candidates(capability: tuple[SupportsIndex, SupportsIndex], sms: SupportsIndex, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str) -> list[str]:
    """
    The GEMM kernels that can run a problem on a GPU of this compute capability, the plan among them; needs no GPU.

    Raises as plan_sparse_linear.
    """

def device_code() -> "dict[str, object]":
    """
    What was built in: targets (["sm_80", ...]), nvcc ("13.0.88") and min_driver ((13, 0), the CUDA version the driver must support).

    A build without device code has no targets and None for the rest.
    """

def devices() -> "list[dict[str, object]]":
    """
    The GPUs in the order of cuda:0, cuda:1, ...: index, name, capability, sms, memory_bytes, memory_gb_s. Empty without a driver.
    """

def driver_version() -> tuple[int, int] | None:
    """
    CUDA version of the driver as (major, minor); None on a machine without one.
    """

def fused_linear(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, ldx: SupportsIndex, rank: SupportsIndex, x: SupportsIndex, score: SupportsIndex, shift: SupportsIndex, comp_down: SupportsIndex, weight: SupportsIndex, comp_up: SupportsIndex, bias: SupportsIndex, branch: SupportsIndex, progress: SupportsIndex, out: SupportsIndex, branch_of_dropped: bool, norm_compensation: bool, eps: SupportsFloat | SupportsIndex) -> None:
    """
    Enqueue selection, sparse product, row scale, branch and bias in one kernel. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """

def gemm_kernel(device_index: SupportsIndex, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str) -> str:
    """
    The GEMM kernel that sparse_linear launches for a problem on a GPU of this machine: the one of set_plan, else the planned one.

    Raises as plan_sparse_linear.
    """

def least_tokens(capability: tuple[SupportsIndex, SupportsIndex], sms: SupportsIndex, memory_gb_s: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str) -> int:
    """
    From how many tokens on a sparse layer (n, k) is estimated to be no slower than a dense one on a GPU of this compute capability; needs no GPU.
    memory_gb_s: as `devices` tells it, 4916 for an H200.

    0 where nothing has been measured, 2^63 - 1 where it never is. Raises as plan_sparse_linear.
    """

def norm_rotary(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, samples: SupportsIndex, tokens: SupportsIndex, first_tokens: SupportsIndex, heads: SupportsIndex, dim: SupportsIndex, strides: tuple[SupportsIndex, SupportsIndex, SupportsIndex], first_strides: tuple[SupportsIndex, SupportsIndex, SupportsIndex], angle_strides: tuple[SupportsIndex, SupportsIndex], x: SupportsIndex, first: SupportsIndex, weight: SupportsIndex, first_weight: SupportsIndex, cos: SupportsIndex, sin: SupportsIndex, out: SupportsIndex, eps: SupportsFloat | SupportsIndex, first_eps: SupportsFloat | SupportsIndex) -> None:
    """
    Enqueue the norm of every head, where there is a weight, and its rotation, first's tokens before x's. Strides are those of samples, tokens
    and heads, and of tokens and pairs of the angles. Addresses are `Tensor.data_ptr()`, or 0.
    """

def plan_sparse_linear(capability: tuple[SupportsIndex, SupportsIndex], sms: SupportsIndex, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str) -> str:
    """
    The GEMM kernel for a problem on a GPU of this compute capability; needs no GPU.

    Raises InvalidArgumentError for sizes the format cannot hold, DeviceError for a GPU without sparse tensor cores.
    """

def probe(device_index: SupportsIndex, stream: SupportsIndex, name: str, steps: SupportsIndex, data: SupportsIndex, metadata: SupportsIndex, sums: SupportsIndex, cycles: SupportsIndex) -> None:
    """
    Enqueue a loop of tensor core instructions on operands in place: name is dense_ss, dense_rs, sparse_ss or sparse_rs.

    Every multiprocessor multiplies 256 x 64 by 64 x 192, `steps` times. Addresses are `Tensor.data_ptr()`; rtlynx.bench.probe has the shapes.
    """

def row_stats(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, k: SupportsIndex, ldx: SupportsIndex, x: SupportsIndex, stats: SupportsIndex, centered: bool, eps: SupportsFloat | SupportsIndex) -> None:
    """
    Enqueue the mean (0 if not centered) and 1 / sqrt(variance + eps) of every row. Addresses are `Tensor.data_ptr()`.
    """

def set_plan(device_index: SupportsIndex, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, dtype: str, kernel: str | None) -> None:
    """
    Run one of the candidates for a problem on a GPU of this machine from now on, in the whole process; None: what is planned for it.

    Raises InvalidArgumentError for a kernel that cannot run it there and as plan_sparse_linear.
    """

def sparse_linear(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, n: SupportsIndex, k: SupportsIndex, rank: SupportsIndex, values: SupportsIndex, metadata: SupportsIndex, weight: SupportsIndex, weight_scale: SupportsIndex, row_scale: SupportsIndex, branch: SupportsIndex, comp_up: SupportsIndex, bias: SupportsIndex, out: SupportsIndex, activation: str, residual: SupportsIndex, gate: SupportsIndex, gates: SupportsIndex) -> None:
    """
    Enqueue the sparse GEMM with row scale, branch, bias and what follows: activation, residual and `gates` rows of a gate. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """

def sparsify(device_index: SupportsIndex, stream: SupportsIndex, dtype: str, m: SupportsIndex, k: SupportsIndex, ldx: SupportsIndex, rank: SupportsIndex, activation: str, head_k: SupportsIndex, ld_head: SupportsIndex, ld_gate: SupportsIndex, norm_rows: SupportsIndex, x: SupportsIndex, gate: SupportsIndex, head: SupportsIndex, norm_stats: SupportsIndex, norm_weight: SupportsIndex, norm_bias: SupportsIndex, score: SupportsIndex, shift: SupportsIndex, places: SupportsIndex, comp_down: SupportsIndex, values: SupportsIndex, metadata: SupportsIndex, row_scale: SupportsIndex, branch: SupportsIndex, branch_of_dropped: bool, eps: SupportsFloat | SupportsIndex, values_scale: SupportsFloat | SupportsIndex) -> None:
    """
    Enqueue selection, compression, row norms and the branch's projection. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
    """

def use_portable_kernels(enabled: bool) -> bool:
    """
    Run the kernels that every GPU from compute capability 8.0 on has, in the whole process, or stop doing so; returns what was set before.

    For tests and comparisons on a GPU that has kernels of its own.
    """
