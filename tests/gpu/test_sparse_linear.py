"""The sparse GEMM against a float64 product of the decompressed operand, by ‖out - ref‖ / ‖ref‖."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, fp8, ops, reference
from shapes import MODEL_SHAPES, OPERANDS, RANKS, TAIL_SHAPES

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
"""One rounding of the result is 2⁻⁹ / √3 = 1.1e-3 (bf16) or 2⁻¹² / √3 = 1.4e-4 (fp16) in this measure; float32 sums add far less."""

TOLERANCE_FP8 = {torch.bfloat16: 5e-3, torch.float16: 3e-3}
"""Tensor cores sum products of 8-bit operands with fewer bits than float32 has, which is given 2e-3; the rest is the rounding above."""


def exact(
    sparse: ops.Sparsified, weight: Tensor, comp_up: Tensor | None, bias: Tensor | None, weight_scale: Tensor | None = None
) -> Tensor:
    """The defined result in float64."""
    out = reference.decompress(sparse.values, sparse.metadata).double() @ weight.double().T
    if weight_scale is not None:
        out *= weight_scale.double()
    if sparse.row_scale.numel():
        out *= sparse.row_scale.double()[:, None]
    if comp_up is not None:
        out += sparse.branch.double() @ comp_up.double().T
    return out if bias is None else out + bias.double()


def check(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    values_dtype: torch.dtype | None = None,
    with_bias: bool = True,
    norm_compensation: bool = True,
) -> None:
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    weight = torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5
    down = torch.randn(k, rank, device="cuda", dtype=dtype) / k**0.5 if rank else None
    up = torch.randn(n, rank, device="cuda", dtype=dtype) if rank else None
    bias = torch.randn(n, device="cuda", dtype=dtype) if with_bias else None
    scale = out_dtype = None
    tolerance = TOLERANCE[dtype]
    if values_dtype is not None:
        weight *= torch.linspace(0.5, 2, n, device="cuda", dtype=dtype)[:, None]  # the scales of output channels differ
        (weight, scale), out_dtype, tolerance = fp8.quantize_weight(weight), dtype, TOLERANCE_FP8[dtype]
    sparse = ops.sparsify(x, comp_down=down, norm_compensation=norm_compensation, values_dtype=values_dtype)
    row_scale, branch = sparse.row_scale if norm_compensation else None, sparse.branch if rank else None
    out = ops.sparse_linear(sparse.values, sparse.metadata, weight, row_scale, branch, up, bias, scale, out_dtype)
    want = exact(sparse, weight, up, bias, scale)
    assert out.shape == want.shape and out.dtype == dtype
    assert (out.double() - want).norm() / want.norm() < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, n, k", TAIL_SHAPES, ids=str)
def test_tails(m: int, n: int, k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check(m, n, k, 64, dtype, values_dtype)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values_dtype", OPERANDS)
@pytest.mark.parametrize("m, n, k", MODEL_SHAPES, ids=str)
def test_model_shapes(m: int, n: int, k: int, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check(m, n, k, 64, dtype, values_dtype)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("norm_compensation", [True, False])
@pytest.mark.parametrize("dtype, values_dtype", [(torch.bfloat16, None), *((dtype, torch.float8_e4m3fn) for dtype in DTYPES)], ids=str)
def test_epilogue(rank: int, with_bias: bool, norm_compensation: bool, dtype: torch.dtype, values_dtype: torch.dtype | None) -> None:
    check(200, 328, 320, rank, dtype, values_dtype, with_bias, norm_compensation)


def test_matches_the_dense_layer_when_nothing_is_dropped() -> None:
    """An input that is 2:4 already must give what F.linear gives: an oracle that shares no code with the format."""
    x = torch.randn(300, 64, 4, device="cuda", dtype=torch.bfloat16)
    x[torch.rand(300, 64, device="cuda").argsort(1) % 2 == 0, :2] = 0
    x[..., 2:][x[..., 0] != 0] = 0
    x = x.flatten(1)
    weight = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    sparse = ops.sparsify(x)
    out = ops.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale)
    want = x.double() @ weight.double().T
    assert torch.allclose(sparse.row_scale, torch.ones_like(sparse.row_scale))
    assert (out.double() - want).norm() / want.norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("values_dtype", OPERANDS)
def test_a_non_finite_token_stays_in_its_row(values_dtype: torch.dtype | None) -> None:
    x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)
    x[17, 3] = float("nan")
    weight, more = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16), {}
    if values_dtype is not None:
        weight, scale = fp8.quantize_weight(weight)
        more = {"weight_scale": scale, "out_dtype": x.dtype}
    sparse = ops.sparsify(x, values_dtype=values_dtype)
    finite = ops.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale, **more).isfinite()
    assert not finite[17].any()
    assert finite[[i for i in range(100) if i != 17]].all()


def test_no_tokens() -> None:
    sparse = ops.sparsify(torch.empty(0, 128, device="cuda", dtype=torch.float16))
    assert ops.sparse_linear(sparse.values, sparse.metadata, torch.randn(16, 128, device="cuda").half()).shape == (0, 16)


def test_bad_input_is_refused_before_anything_runs() -> None:
    sparse = ops.sparsify(torch.randn(8, 128, device="cuda", dtype=torch.bfloat16))
    weight = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    call = lambda **kw: ops.sparse_linear(**{"values": sparse.values, "metadata": sparse.metadata, "weight": weight, **kw})  # noqa: E731
    for argument, bad in {
        "weight": [weight.half(), weight.cpu(), weight[:, :64], weight[:9], torch.randn(128, 16, device="cuda").bfloat16().T],
        "metadata": [sparse.metadata.long(), sparse.metadata[:, :0]],
        "bias": [torch.zeros(15, device="cuda").bfloat16(), torch.zeros(32, device="cuda").bfloat16()[1:17]],
        "row_scale": [torch.ones(8, device="cuda").half()],
        "comp_up": [torch.ones(16, 16, device="cuda").bfloat16()],
    }.items():
        for value in bad:
            with pytest.raises(InvalidArgumentError) as caught:
                call(**{argument: value})
            assert caught.value.op == "sparse_linear"
    with pytest.raises(InvalidArgumentError, match="float32"):
        ops.sparsify(torch.randn(8, 128, device="cuda"))


@pytest.mark.parametrize("values_dtype", OPERANDS[1:])
def test_a_scale_apart_in_memory_is_refused(values_dtype: torch.dtype) -> None:
    weight, scale = fp8.quantize_weight(torch.randn(16, 128, device="cuda"))
    sparse = ops.sparsify(torch.randn(8, 128, device="cuda", dtype=torch.bfloat16), values_dtype=values_dtype)
    apart = scale.repeat_interleave(2)[::2]
    with pytest.raises(InvalidArgumentError, match=r"`weight_scale`.*contiguous"):
        ops.sparse_linear(sparse.values, sparse.metadata, weight, weight_scale=apart, out_dtype=torch.bfloat16)
