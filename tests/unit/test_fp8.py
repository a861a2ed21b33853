"""FP8 in the reference and the ops: what is stored, in which order, what comes out, and what bad input gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import InvalidArgumentError, fp8, ops, reference
from rtlynx.reference import E4M3

T_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def e4m3_numbers() -> list[float]:
    """The finite ones that are not negative, from the definition: 4 bits of exponent with bias 7, 3 of mantissa, all ones is NaN."""
    return [mantissa / 8 * 2.0**-6 for mantissa in range(8)] + [
        (1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8) if (exponent, mantissa) != (15, 7)
    ]


def nearest(x: float) -> float:
    """To nearest, ties to the even mantissa, saturated."""
    numbers = e4m3_numbers()
    best = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - min(abs(x), 448)), i % 2))
    return math.copysign(numbers[best], x)


# ---- the reference ----------------------------------------------------------------------------------------------------------------------


def test_numbers_are_rounded_to_the_nearest_of_the_definition() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500) * torch.logspace(-4, 3, 500), torch.tensor(e4m3_numbers()).unfold(0, 2, 1).mean(1)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 448.0, 463.9, 464.0, 1e30])])
    got = reference.e4m3(x).float()
    want = torch.tensor([nearest(v) for v in x.tolist()])
    assert torch.equal(got, want) and torch.equal(got.signbit(), x.signbit())


def test_infinity_saturates_and_nan_is_one_pattern_of_bits() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan])
    assert reference.e4m3(x).view(torch.uint8).tolist() == [0x7E, 0xFE, 0x7F, 0x7F]


@pytest.mark.parametrize("dtype", T_DTYPES, ids=str)
@pytest.mark.parametrize("values_scale", [1.0, 0.25])
@pytest.mark.parametrize("branch_input", ["input", "dropped"])
def test_only_the_values_and_the_order_of_the_metadata_differ(
    dtype: torch.dtype, values_scale: float, branch_input: reference.BranchInput
) -> None:
    torch.manual_seed(1)
    x, score, shift, down = torch.randn(70, 448).to(dtype) * 40, torch.rand(448), torch.randn(448), torch.randn(448, 16).to(dtype)
    x[3, 5], x[4, 6], x[5, :8] = math.nan, math.inf, 1e4
    plain = reference.sparsify(x, score, shift, down, branch_input)
    got = reference.sparsify(x, score, shift, down, branch_input, values_dtype=E4M3, values_scale=values_scale)
    assert torch.equal(got.values.view(torch.uint8), reference.e4m3(plain.values.float() * values_scale).view(torch.uint8))
    assert torch.equal(
        reference.unpack_metadata(got.metadata, 70, 448, E4M3), reference.unpack_metadata(plain.metadata, 70, 448, plain.values.dtype)
    )
    for a, b in ((got.row_scale, plain.row_scale), (got.branch, plain.branch)):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert got.values.float().isnan().nonzero()[:, 0].unique().tolist() == [3]
    assert got.values.float()[4].abs().max() == 448


@pytest.mark.parametrize("m, k", [(1, 64), (17, 320), (64, 256), (130, 832)])
def test_words_hold_the_nibbles_that_the_format_document_says(m: int, k: int) -> None:
    torch.manual_seed(m)
    positions = reference.kept_positions(reference.keep_mask(torch.randn(m, k)))
    words = reference.pack_metadata(positions, E4M3)
    assert words.shape == reference.metadata_shape(m, k) and words.dtype == torch.int32
    blocks, tiles = words.shape[:2]
    for kb in range(blocks):
        for t in range(tiles):
            for lane, j in [(0, 0), (1, 1), (2, 2), (7, 3), (22, 1), (31, 2), (29, 0)]:
                g, q = divmod(lane, 4)
                row = 16 * t + g + 8 * (q & 1)
                word = words[kb, t, lane, j].item() & 0xFFFFFFFF
                for c in range(8):
                    group = (256 * kb + 64 * j + 32 * (q >> 1) + 4 * c) // 4
                    nibble = 4
                    if row < m and group < k // 4:
                        first, second = positions[row, group].tolist()
                        nibble = first | second << 2
                    assert word >> (4 * c) & 0xF == nibble
    assert torch.equal(reference.unpack_metadata(words, m, k, E4M3), positions)


def test_words_are_those_of_16_bit_values_with_halves_exchanged() -> None:
    positions = reference.kept_positions(reference.keep_mask(torch.randn(70, 448)))
    old = reference.pack_metadata(positions).long() & 0xFFFFFFFF
    new = reference.pack_metadata(positions, E4M3).long() & 0xFFFFFFFF
    for q in range(4):
        even, odd = old[:, :, q & ~1 :: 4], old[:, :, q | 1 :: 4]
        want = (even >> 16) | (odd >> 16 << 16) if q & 1 else (even & 0xFFFF) | (odd & 0xFFFF) << 16
        assert torch.equal(new[:, :, q::4], want)


def test_padding_and_groups_of_zeros_are_the_same_word() -> None:
    assert (reference.sparsify(torch.zeros(3, 64), values_dtype=E4M3).metadata == 0x44444444).all()


def test_decompress_gives_back_the_rounded_selection() -> None:
    x = torch.randn(33, 192)
    sparse = reference.sparsify(x, values_dtype=E4M3)
    dense = reference.decompress(sparse.values, sparse.metadata)
    assert dense.dtype == E4M3
    assert torch.equal(dense.float(), reference.e4m3(torch.where(reference.keep_mask(x), x, 0)).float())


# ---- the weight -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", T_DTYPES, ids=str)
def test_a_weight_fills_the_range_of_each_output_channel(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = (torch.randn(24, 128) * torch.logspace(-3, 2, 24)[:, None]).to(dtype)
    weight[5] = 0
    quantised, scale = fp8.quantize_weight(weight, values_scale=0.5)
    assert (quantised.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (24,))
    largest = quantised.float().abs().amax(1)
    assert largest[5] == 0 and scale[5] == 2
    assert (largest[[n for n in range(24) if n != 5]] == 448).all()
    error = (quantised.float() * scale[:, None] * 0.5 - weight.float()).norm(dim=1) / weight.float().norm(dim=1).clamp(min=1e-30)
    assert error.max() < 2**-4 / 3**0.5  # one rounding: at most 2⁻⁴ of an element, less in the mean


@pytest.mark.parametrize(("peak", "scale"), [(0.0, 1.0), (224.0, 1.0), (225.0, 0.5), (448.0, 0.5), (449.0, 0.25), (1e4, 2.0**-6)])
def test_values_are_scaled_so_that_twice_the_peak_fits(peak: float, scale: float) -> None:
    assert fp8.values_scale_for(peak) == scale
    assert 2 * peak * scale <= reference.E4M3_MAX


def test_weights_that_are_not_finite_stay_so() -> None:
    weight = torch.ones(3, 64)
    weight[0, 3], weight[1, 5] = math.nan, math.inf
    quantised, scale = fp8.quantize_weight(weight)
    finite = (quantised.float() * scale[:, None]).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


def test_names_of_element_types_are_read_back() -> None:
    for dtype in T_DTYPES:
        for values_dtype in (None, E4M3):
            assert fp8.element_types(fp8.kernel_dtype(dtype, values_dtype)) == (dtype, values_dtype)
    assert fp8.kernel_dtype(torch.float16, E4M3) == "float16_e4m3"
    assert fp8.kernel_dtype(torch.bfloat16, torch.bfloat16) == "bfloat16"


# ---- the ops ----------------------------------------------------------------------------------------------------------------------------


def layer(dtype: torch.dtype = torch.bfloat16, n: int = 24, k: int = 128, rank: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weight, scale = fp8.quantize_weight((torch.randn(n, k) / k**0.5).to(dtype))
    return weight, scale, (torch.randn(k, rank) / k**0.5).to(dtype), torch.randn(n, rank).to(dtype), torch.randn(n).to(dtype)


def forward(x: Tensor, weight: Tensor, scale: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    s = ops.sparsify(x, comp_down=down, values_dtype=E4M3)
    return ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, up, bias, scale, x.dtype)


@pytest.mark.parametrize("dtype", T_DTYPES, ids=str)
def test_the_product_is_the_formula(dtype: torch.dtype) -> None:
    x = torch.randn(33, 128).to(dtype)
    weight, scale, down, up, bias = layer(dtype)
    s = ops.sparsify(x, comp_down=down, values_dtype=E4M3, values_scale=4.0)
    out = ops.sparse_linear(s.values, s.metadata, weight, s.row_scale, s.branch, up, bias, scale / 4, dtype)
    dense = reference.decompress(s.values, s.metadata).double() @ weight.double().T * (scale.double() / 4)
    want = s.row_scale.double()[:, None] * dense + s.branch.double() @ up.double().T + bias.double()
    assert out.dtype == dtype
    assert (out.double() - want).norm() / want.norm() < {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}[dtype]


OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""All but the check of the schema, which multiplies what an op returns, and torch does not multiply e4m3."""


def test_opcheck() -> None:
    weight, scale, down, up, bias = layer()
    x = torch.randn(70, 128).bfloat16()
    torch.library.opcheck(torch.ops.rtlynx.sparsify.default, (x, None, None, down, "dropped", True, 1e-8, E4M3, 2.0), test_utils=OPCHECKS)
    s = ops.sparsify(x, comp_down=down, values_dtype=E4M3)
    args = (s.values, s.metadata, weight, s.row_scale, s.branch, up, bias, scale, torch.bfloat16)
    torch.library.opcheck(torch.ops.rtlynx.sparse_linear.default, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compiles_whole_with_a_dynamic_number_of_tokens(backend: str) -> None:
    torch._dynamo.reset()
    args = layer()
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    for i, m in enumerate((8, 40, 3, 129)):
        x = torch.randn(m, 128).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, *args), forward(x, *args))


def test_no_tokens() -> None:
    out = forward(torch.empty(0, 128).bfloat16(), *layer())
    assert out.shape == (0, 24) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("requires", ["x", "down", "up", "bias"])
def test_a_backward_pass_is_refused_whatever_asks_for_it(requires: str) -> None:
    x = torch.randn(9, 128).bfloat16()
    weight, scale, down, up, bias = layer()
    {"x": x, "down": down, "up": up, "bias": bias}[requires].requires_grad_()
    out = forward(x, weight, scale, down, up, bias)
    with pytest.raises(InvalidArgumentError, match=r"gradient through e4m3 values \(fp8\)"):
        out.sum().backward()


def test_the_branch_of_fp8_alone_has_no_gradient_either() -> None:
    x, down = torch.randn(9, 128).requires_grad_(), torch.randn(128, 16)
    with pytest.raises(InvalidArgumentError, match="sparsify: argument `values`"):
        ops.sparsify(x, comp_down=down, values_dtype=E4M3).branch.sum().backward()


X = torch.randn(8, 128)
S = ops.sparsify(X, comp_down=torch.randn(128, 16), values_dtype=E4M3)
WEIGHT, SCALE = fp8.quantize_weight(torch.randn(24, 128))
GOOD = {"values": S.values, "metadata": S.metadata, "weight": WEIGHT, "weight_scale": SCALE, "out_dtype": torch.float32}
PLAIN = ops.sparsify(X)


@pytest.mark.parametrize(
    "argument, change",
    [
        ("values_dtype", {"values_dtype": torch.float8_e5m2}),
        ("values_dtype", {"values_dtype": torch.float32}),
        ("values_scale", {"values_scale": 2.0}),
        ("values_scale", {"values_dtype": E4M3, "values_scale": 0.0}),
        ("values_scale", {"values_dtype": E4M3, "values_scale": -1.0}),
        ("values_scale", {"values_dtype": E4M3, "values_scale": math.inf}),
        ("values_scale", {"values_dtype": E4M3, "values_scale": math.nan}),
        ("x", {"x": X.to(E4M3), "values_dtype": E4M3}),
        ("comp_down", {"comp_down": torch.ones(128, 16).to(E4M3), "values_dtype": E4M3}),
    ],
)
def test_sparsify_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparsify(**{"x": X, **change})
    assert (caught.value.op, caught.value.argument) == ("sparsify", argument)


@pytest.mark.parametrize(
    "argument, change",
    [
        ("weight", {"weight": torch.randn(24, 128)}),
        ("weight", {"weight": torch.randn(24, 128).to(torch.float8_e5m2)}),
        ("weight", {"weight": WEIGHT[:, :64]}),
        ("weight_scale", {"weight_scale": None}),
        ("weight_scale", {"weight_scale": SCALE[:23]}),
        ("weight_scale", {"weight_scale": SCALE.repeat_interleave(2)[::2]}),
        ("weight_scale", {"weight_scale": SCALE[:, None]}),
        ("weight_scale", {"weight_scale": SCALE.half()}),
        ("weight_scale", {"weight_scale": SCALE.to("meta")}),
        ("out_dtype", {"out_dtype": None}),
        ("out_dtype", {"out_dtype": E4M3}),
        ("out_dtype", {"out_dtype": torch.float64}),
        ("metadata", {"metadata": S.metadata[:, :, :3]}),
        ("branch", {"branch": S.branch.half(), "comp_up": torch.randn(24, 16)}),
        ("comp_up", {"branch": S.branch, "comp_up": torch.randn(24, 16).to(E4M3)}),
        ("bias", {"bias": torch.randn(24).bfloat16()}),
        ("row_scale", {"row_scale": torch.ones(7)}),
        ("weight_scale", {"values": PLAIN.values, "weight": torch.randn(24, 128), "out_dtype": None}),
        ("out_dtype", {"values": PLAIN.values, "weight": torch.randn(24, 128), "weight_scale": None}),
        ("weight", {"values": PLAIN.values, "weight_scale": None, "out_dtype": None}),
    ],
)
def test_sparse_linear_refuses(argument: str, change: dict[str, Any]) -> None:
    ops.sparse_linear(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError) as caught:
        ops.sparse_linear(**{**GOOD, **change})
    assert (caught.value.op, caught.value.argument) == ("sparse_linear", argument)
