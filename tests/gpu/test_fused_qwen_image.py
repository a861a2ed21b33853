"""What Qwen-Image's blocks do between their layers, eager on a GPU: fewer passes are taken, and give what diffusers' code gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, norm_rotary
from rtlynx.activations import selection_does
from rtlynx.fusions import fusion, rotary
from tiny_models import TINY, output, relative_error

BLOCKS = 2
DTYPES = [torch.bfloat16, torch.float16]
QWEN = TINY["qwen_image"]


def sparse_model(dtype: torch.dtype) -> Any:
    return rtlynx.apply(QWEN.build("cuda", dtype), rtlynx.SparsityConfig(small_m="sparse"))


def inputs_of(samples: int, mask: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs = {
        name: value[:samples] if isinstance(value, (Tensor, list)) and len(value) == 2 else value
        for name, value in QWEN.inputs("cuda", dtype).items()
    }
    if mask == "none":
        del inputs["encoder_hidden_states_mask"]
    else:
        inputs["encoder_hidden_states_mask"][:, -5:] = False
    return inputs


def set_dense(model: nn.Module, dense: bool) -> None:
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.dense = dense


@pytest.mark.parametrize("lengths", [(1, 1), (4096, 256), (65, 19)], ids=str)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, samples: int, lengths: tuple[int, int]) -> None:
    image, text = (torch.randn(samples, length, 3, 128, device="cuda", dtype=dtype) for length in lengths)
    angles = 100 * torch.randn(sum(lengths), 64, device="cuda")
    of_image, of_text = torch.polar(torch.ones_like(angles), angles).split(lengths)
    want = [apply_rotary_emb_qwen(x, each, use_real=False) for x, each in ((text, of_text), (image, of_image))]
    got = rotary.rotated([text, image], torch.cat([of_text, of_image])[:, None])
    torch.testing.assert_close(got, torch.cat(want, 1), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_results(dtype: torch.dtype, samples: int, mask: str, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse_model(dtype), inputs_of(samples, mask, dtype)
    modulated = 4 * BLOCKS if samples == 1 else 0  # several samples have no such kernel
    assert output(model, inputs).isfinite().all()
    taken_up = "norm_rotary", "_modulated", "addcmul"
    sums = 0 if selection_does(torch.device("cuda"), "gelu_tanh") else 2 * BLOCKS  # products add the others
    assert [taken.count(name) for name in taken_up] == [2 * BLOCKS, modulated, sums]
    set_dense(model, True)  # what is selected may change with a last bit, and everything after it
    taken.clear()
    got = output(model, inputs)
    assert [taken.count(name) for name in taken_up] == [2 * BLOCKS, modulated, 4 * BLOCKS]
    taken.clear()
    monkeypatch.setattr(norm_rotary, "available", lambda device: False)
    assert relative_error(got, output(model, inputs)) < 1e-2
    assert taken.count("rotated") == 2 * BLOCKS and "norm_rotary" not in taken
    taken.clear()
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    want = output(model, inputs)
    assert not taken
    assert relative_error(got, want) < 1e-2  # roundings of the model's dtype


@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_results_with_sparse_layers(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse_model(torch.float16), inputs_of(samples, "none", torch.float16)
    got = output(model, inputs)
    monkeypatch.setattr(norm_rotary, "available", lambda device: False)
    monkeypatch.setattr(fusion, "eager", lambda x: False)
    assert relative_error(got, output(model, inputs)) < 3e-2  # a rounding may flip a near-tie of a later layer's selection


def test_compiled_blocks_merge_the_other_passes_themselves(taken: list[str]) -> None:
    model, inputs = sparse_model(torch.bfloat16), inputs_of(1, "some", torch.bfloat16)
    set_dense(model, True)
    want = output(model, inputs)
    taken.clear()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    got = output(model, inputs)
    assert taken == ["norm_rotary_cuda"] * 2 * BLOCKS
    assert relative_error(got, want) < 1e-2
