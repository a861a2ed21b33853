"""What FLUX.1's blocks do between their layers, eager on a GPU: fewer passes are taken, and give what diffusers' code gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import embeddings
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, norm_rotary
from rtlynx.fusions import fusion, rotary
from tiny_models import NEIGHBOURS, TINY, output, relative_error

DTYPES = [torch.bfloat16, torch.float16]
FLUX = TINY["flux"]


def embedding(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """As FLUX.1 gives it: every angle twice in a row."""
    angles = (100 * torch.randn(tokens, channels // 2, device="cuda")).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("lengths", [(1,), (37,), (512, 4096), (19, 65), (0, 5)], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, samples: int, lengths: tuple[int, ...]) -> None:
    parts = [torch.randn(samples, length, 3, 128, device="cuda", dtype=dtype) for length in lengths]
    emb = embedding(sum(lengths), 128)
    got = rotary.rotated(parts, rotary.rotation(emb))
    want = embeddings.apply_rotary_emb(torch.cat(parts, 1), emb, sequence_dim=1)
    # In float32 the two may differ by a rounding, where a product is not rounded before the sum, and that may turn the one at the end.
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 77, 4608])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_sum_is_rounded_once(dtype: torch.dtype, tokens: int, taken: list[str]) -> None:
    residual, update = (torch.randn(2, tokens, 200, device="cuda", dtype=dtype) for _ in range(2))
    gate = torch.randn(2, 6 * 200, device="cuda", dtype=dtype).chunk(6, 1)[2]  # as a modulation gives it
    exact = residual.double() + gate[:, None].double() * update.double()
    got = fusion.add_gated(residual, gate, update)
    assert taken == ["addcmul"]
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def set_dense(model: nn.Module, dense: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.dense = dense


def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the whole of queries and keys."""
    monkeypatch.setattr(norm_rotary, "available", lambda device: False)


@pytest.mark.parametrize("projections", ["apart", "fused"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned_by", ["norm_rotary", "rotated"])
def test_the_same_results(
    turned_by: str, dtype: torch.dtype, samples: int, projections: str, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if turned_by == "rotated":
        no_kernel(monkeypatch)
    model: Any = rtlynx.apply(FLUX.build("cuda", dtype), rtlynx.SparsityConfig(small_m="sparse"))
    inputs = {
        name: value[:samples] if isinstance(value, Tensor) and len(value) == 2 else value
        for name, value in FLUX.inputs("cuda", dtype).items()
    }
    if projections == "fused":
        model.fuse_qkv_projections()
    output(model, inputs)
    assert taken.count(turned_by) == 2 * 3 and taken.count("addcmul") == 2  # after attention; products add what follows the other layers
    assert taken.count("_modulated") == (2 + 2 + 2 if samples == 1 else 0)  # several samples have no such kernel
    set_dense(model, True)  # what is selected may change with a last bit, and everything after it
    taken.clear()
    got = output(model, inputs)
    assert taken.count(turned_by) == 2 * 3 and taken.count("addcmul") == 4  # dense single-stream blocks are diffusers' own
    taken.clear()
    no_kernel(monkeypatch)
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    want = output(model, inputs)
    assert not taken
    assert relative_error(got, want) < 1e-2  # roundings of the model's dtype


def test_the_same_results_of_flux2(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = NEIGHBOURS["flux2"]
    model: Any = rtlynx.apply(tiny.build("cuda", torch.bfloat16), rtlynx.SparsityConfig(small_m="sparse"))
    inputs = tiny.inputs("cuda", torch.bfloat16)
    assert output(model, inputs).isfinite().all()
    assert taken == ["norm_rotary"] * 2 * (len(model.transformer_blocks) + len(model.single_transformer_blocks))
    set_dense(model, True)
    taken.clear()
    got = output(model, inputs)
    assert len(taken) == 2 * len(model.transformer_blocks)  # dense single-stream blocks are diffusers' own
    no_kernel(monkeypatch)
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    assert relative_error(got, output(model, inputs)) < 1e-2


def test_compiled_blocks_merge_the_other_passes_themselves(taken: list[str]) -> None:
    model: Any = rtlynx.apply(FLUX.build("cuda", torch.bfloat16), rtlynx.SparsityConfig(small_m="sparse"))
    inputs = FLUX.inputs("cuda", torch.bfloat16)
    set_dense(model, True)
    want = output(model, inputs)
    taken.clear()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    got = output(model, inputs)
    assert taken == ["norm_rotary_cuda"] * 2 * 3
    assert relative_error(got, want) < 1e-2
