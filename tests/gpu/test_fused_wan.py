"""What Wan's blocks do between their layers, eager on a GPU: fewer passes are taken, and give what diffusers' code gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear
from rtlynx.activations import selection_does
from rtlynx.fusions import fusion, rotary, wan, wan_attention
from tiny_models import NEIGHBOURS, output, relative_error, wan_as_loaded

BLOCKS = 2
DTYPES = [torch.bfloat16, torch.float16]
WAN = NEIGHBOURS["wan"]
times = pytest.mark.parametrize("time", ["of a sample", "of a token"])


def sparse_model(dtype: torch.dtype) -> Any:
    return rtlynx.apply(WAN.build("cuda", dtype), rtlynx.SparsityConfig(small_m="sparse"))


def inputs_of(samples: int, time: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs = {name: value[:samples] for name, value in WAN.inputs("cuda", dtype).items()}
    if time == "of a token":  # Wan 2.2's 5B model
        inputs["timestep"] = torch.arange(samples * 3 * 4 * 4, device="cuda").reshape(samples, -1)
    return inputs


def set_dense(model: nn.Module, dense: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.dense = dense


@pytest.mark.parametrize("tokens", [1, 37, 14040])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, samples: int, tokens: int) -> None:
    x = torch.randn(samples, tokens, 3, 128, device="cuda", dtype=dtype)
    angles = (100 * torch.randn(1, tokens, 1, 64, device="cuda")).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)  # as its processor has it, in a function of its own within
    of_pairs = cos[..., 0::2], sin[..., 1::2]
    want = torch.stack([x1 * of_pairs[0] - x2 * of_pairs[1], x1 * of_pairs[1] + x2 * of_pairs[0]], -1).flatten(-2).to(dtype)
    got = rotary.rotated([x], wan_attention._rotation(cos, sin))
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("tokens", [1, 77, 14040])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_with_a_float32_gate_is_rounded_once(dtype: torch.dtype, tokens: int, of_tokens: bool, taken: list[str]) -> None:
    residual, update = (torch.randn(2, tokens, 200, device="cuda", dtype=dtype) for _ in range(2))
    gate = torch.randn(2, *([tokens] if of_tokens else []), 6, 200, device="cuda").unbind(-2)[2]  # as a modulation gives it
    exact = residual.double() + (gate if of_tokens else gate[:, None]).double() * update.double()
    got = fusion.add_gated(residual, gate, update)
    assert taken == ["addcmul"] and got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, samples: int, taken: list[str]) -> None:
    x = torch.randn(samples, 77, 200, device="cuda", dtype=dtype)
    scale, shift = torch.randn(samples, 6, 200, device="cuda").unbind(1)[:2]
    norm = FP32LayerNorm(200, 1e-6, elementwise_affine=False)
    want = norm(x.float()) * (1 + scale[:, None]) + shift[:, None]
    assert relative_error(wan._modulated(x, norm, scale, shift), want) < torch.finfo(dtype).eps
    affine = FP32LayerNorm(200, 1e-6).cuda()
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    assert relative_error(wan._affine(x, affine), affine(x.float())) < torch.finfo(dtype).eps
    assert taken == ["addcmul"] * 2
    affine.to(dtype)
    torch.testing.assert_close(wan._affine(x, affine), affine(x.float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert taken == ["addcmul"] * 2


@times
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_results(
    dtype: torch.dtype, samples: int, kept: bool, time: str, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = sparse_model(dtype), inputs_of(samples, time, dtype)
    if kept:
        wan_as_loaded(model, "cuda")
    assert output(model, inputs).isfinite().all()
    norms = 3 if kept else 2
    # products add the others
    sums = 2 if time == "of a token" else 0 if selection_does(torch.device("cuda"), "gelu_tanh") else 1
    assert [taken.count(name) for name in ("rotated", "addcmul")] == [2 * BLOCKS, (norms + sums) * BLOCKS]
    set_dense(model, True)  # what is selected may change with a last bit, and everything after it
    taken.clear()
    got = output(model, inputs)
    assert [taken.count(name) for name in ("rotated", "addcmul")] == [2 * BLOCKS, (norms + 2) * BLOCKS]
    taken.clear()
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    want = output(model, inputs)
    assert not taken
    assert relative_error(got, want) < 1e-2  # roundings of the model's dtype


@times
@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_results_with_sparse_layers(samples: int, time: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse_model(torch.float16), inputs_of(samples, time, torch.float16)
    got = output(model, inputs)
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    assert relative_error(got, output(model, inputs)) < 3e-2  # a rounding may flip a near-tie of a later layer's selection


def test_a_graph_replays_the_same(taken: list[str]) -> None:
    model, inputs = sparse_model(torch.bfloat16), inputs_of(1, "of a sample", torch.bfloat16)
    block = model.blocks[0]
    hidden, text, temb = (torch.randn(1, *size, device="cuda", dtype=torch.bfloat16) for size in ((48, 128), (529, 128), (6, 128)))
    rotation = model.rope(inputs["hidden_states"])

    def run() -> Tensor:
        return block(hidden, text, temb, rotation)  # type: ignore[no-any-return]

    with torch.no_grad():
        want = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
    assert "rotated" in taken and relative_error(got, want) < 1e-3


def test_compiled_blocks_merge_these_passes_themselves(taken: list[str]) -> None:
    model, inputs = sparse_model(torch.bfloat16), inputs_of(1, "of a sample", torch.bfloat16)
    set_dense(model, True)
    want = output(model, inputs)
    taken.clear()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    got = output(model, inputs)
    assert not taken
    assert relative_error(got, want) < 1e-2
