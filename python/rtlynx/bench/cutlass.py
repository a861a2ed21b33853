"""CUTLASS's sparse GEMM as a peer: every kernel of `cutlass_sparse.cu` with every swizzle is a call, checked before it is timed."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache, partial

import torch
from torch import Tensor

from rtlynx import reference
from rtlynx.bench import cutlass_build
from rtlynx.bench.peer import Calls, Operands, Unavailable

COLUMN = "cutlass_mm"
SWIZZLES = (1, 8)
"""Widths of the raster's block columns, in output tiles: CUTLASS's default, and one that finds more of its operands in L2."""
_TOLERANCE = 1e-2  # of the norm; rounding the output to bfloat16 is 2⁻⁹ at most
_Compressed = tuple[Tensor, Tensor]


@cache
def _library() -> ctypes.CDLL:
    path = cutlass_build.library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"CUTLASS's library does not load: {error}; remove it to have it compiled anew") from error
    library.rtlynx_cutlass_count.argtypes, library.rtlynx_cutlass_count.restype = [], c_int
    library.rtlynx_cutlass_name.argtypes, library.rtlynx_cutlass_name.restype = [c_int], c_char_p
    library.rtlynx_cutlass_tile_k.argtypes, library.rtlynx_cutlass_tile_k.restype = [c_int], c_int
    library.rtlynx_cutlass_sizes.argtypes = [c_int] * 4 + [c_void_p]
    library.rtlynx_cutlass_compress.argtypes = [c_int] * 3 + [c_void_p] * 4
    library.rtlynx_cutlass_run.argtypes = [c_int] * 5 + [c_void_p] * 6
    for function in (library.rtlynx_cutlass_sizes, library.rtlynx_cutlass_compress, library.rtlynx_cutlass_run):
        function.restype = c_char_p  # what went wrong
    return library


def calls(layer: Operands) -> Calls:
    """The product of the layer's activation, which is 2:4 already, and its weight, without bias; ``cutlass_mm:<kernel>`` for every kernel.

    Raises:
        Unavailable: The GPU, CUTLASS or nvcc is missing, or no kernel takes these sizes.
        RuntimeError: A kernel fails, or its product is wrong.
    """
    if not layer.x.is_cuda or torch.cuda.get_device_capability(layer.x.device) != (9, 0):
        raise Unavailable("CUTLASS's sparse GEMM needs a GPU of compute capability 9.0")
    if layer.x.dtype != torch.bfloat16:
        raise Unavailable("CUTLASS's sparse GEMM is compiled for bfloat16 only")
    library = _library()
    pruned = reference.decompress(layer.sparse.values, layer.sparse.metadata)
    (m, k), n = pruned.shape, len(layer.weight)
    expected = pruned @ layer.weight.T
    out = torch.empty_like(expected)
    compressed: dict[int, _Compressed] = {}
    found: dict[str, partial[None]] = {}
    refusal = "it has none"
    for kernel in range(library.rtlynx_cutlass_count()):
        sizes = (c_int64 * 3)()
        if (why := library.rtlynx_cutlass_sizes(kernel, m, n, k, sizes)) is not None:
            refusal = why.decode()
            continue
        values_bytes, metadata_bytes, workspace_bytes = sizes
        workspace = _bytes(workspace_bytes)
        tile_k = library.rtlynx_cutlass_tile_k(kernel)
        if tile_k not in compressed:
            compressed[tile_k] = _compress(kernel, pruned, values_bytes, metadata_bytes)
        name = library.rtlynx_cutlass_name(kernel).decode()
        for swizzle in SWIZZLES:
            call = partial(_run, kernel, swizzle, *compressed[tile_k], layer.weight, out, workspace)
            out.fill_(float("nan"))
            call()
            error = float(torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected.float()))
            if not error <= _TOLERANCE:
                raise RuntimeError(f"CUTLASS's {name} with swizzle {swizzle}: wrong product, relative error {error:.2g}")
            found[f"{COLUMN}:{name}_swizzle{swizzle}"] = call
    if not found:
        raise Unavailable(f"none of CUTLASS's sparse kernels takes M {m}, N {n}, K {k}: {refusal}")
    return found


def _compress(kernel: int, pruned: Tensor, values_bytes: int, metadata_bytes: int) -> _Compressed:
    values, metadata = _bytes(values_bytes), _bytes(metadata_bytes)
    m, k = pruned.shape
    stream = torch.cuda.current_stream().cuda_stream
    _check(_library().rtlynx_cutlass_compress(kernel, m, k, pruned.data_ptr(), values.data_ptr(), metadata.data_ptr(), stream))
    return values, metadata


def _run(kernel: int, swizzle: int, values: Tensor, metadata: Tensor, weight: Tensor, out: Tensor, workspace: Tensor) -> None:
    (m, n), k = out.shape, weight.shape[1]
    pointers = (tensor.data_ptr() for tensor in (values, metadata, weight, out, workspace))
    _check(_library().rtlynx_cutlass_run(kernel, m, n, k, swizzle, *pointers, torch.cuda.current_stream().cuda_stream))


def _check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(f"CUTLASS: {message.decode()}")


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cuda")
