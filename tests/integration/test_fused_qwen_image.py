"""What Qwen-Image's blocks do between their layers, in fewer passes: the same results, and diffusers' own code where it must be that."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

import rtlynx
from fused_models import ALL, F32, as_diffusers_has_it, layers, sparse, unfused
from rtlynx import SparsityConfig, ops
from rtlynx.fusions import known, norms, qwen_image, qwen_image_attention, rotary
from tiny_models import output, relative_error

BLOCKS = 2
QWEN = ALL["qwen_image"]
BLOCK = transformer_qwenimage.QwenImageTransformerBlock
LIMIT = {F32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the relative error: roundings of the dtype."""


def given(samples: int, mask: str, dtype: torch.dtype = F32) -> dict[str, Any]:
    inputs = {
        name: value[:samples] if isinstance(value, (Tensor, list)) and len(value) == 2 else value
        for name, value in QWEN.inputs("cpu", dtype).items()
    }
    if mask == "none":
        del inputs["encoder_hidden_states_mask"]
    if mask == "some":
        inputs["encoder_hidden_states_mask"][:, -5:] = False
    return inputs


def embedding(image: int, text: int, pairs: int) -> tuple[Tensor, Tensor]:
    """As Qwen-Image gives it: complex numbers of length 1."""
    angles = 100 * torch.randn(image + text, pairs)
    image_part, text_part = torch.polar(torch.ones_like(angles), angles).split([image, text])
    return image_part, text_part


def block_and_inputs(dtype: torch.dtype = F32, **options: Any) -> tuple[Any, dict[str, Any]]:
    """One fused block whose layers are dense, and what it takes for one sample."""
    torch.manual_seed(0)
    block = BLOCK(128, 4, 32, **options).to(dtype).eval()
    rtlynx.apply(nn.ModuleList([block]), SparsityConfig(include=("**.to_q", "**.net.2"), share_inputs=False))
    for layer in layers(block):
        layer.dense = True
    return block, {
        "hidden_states": torch.randn(1, 64, 128).to(dtype),
        "encoder_hidden_states": torch.randn(1, 19, 128).to(dtype),
        "encoder_hidden_states_mask": None,
        "temb": torch.randn(1, 128).to(dtype),
        "image_rotary_emb": embedding(64, 19, 16),
    }


# ---- the same results --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "all", "some"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_the_same_results(dtype: torch.dtype, samples: int, mask: str, rotations: list[int]) -> None:
    model, inputs = sparse("qwen_image", dtype)[0], given(samples, mask, dtype)
    for layer in layers(model):  # what is selected may change with a last bit, and everything after it
        layer.dense = True
    got = output(model, inputs)
    assert rotations == [2, 2] * BLOCKS
    want = as_diffusers_has_it(model, lambda: output(model, inputs))
    assert len(rotations) == 2 * BLOCKS
    assert got.dtype == want.dtype == dtype and relative_error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_results_with_sparse_layers(samples: int, mask: str, rotations: list[int]) -> None:
    model, inputs = sparse("qwen_image")[0], given(samples, mask)
    got = output(model, inputs)
    assert rotations == [2, 2] * BLOCKS
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5
    assert relative_error(got, unfused(model, inputs)) < 1e-5
    assert len(rotations) == 2 * BLOCKS


def test_bfloat16_is_no_less_exact(rotations: list[int]) -> None:
    exact, inputs = QWEN.build("cpu", torch.bfloat16).double(), given(1, "none", torch.bfloat16)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    want = output(exact, wide)
    model = rtlynx.apply(QWEN.build("cpu", torch.bfloat16))
    for layer in layers(model):
        layer.dense = True
    got = relative_error(output(model, inputs), want)
    assert got < 1.1 * relative_error(as_diffusers_has_it(model, lambda: output(model, inputs)), want)


@pytest.mark.parametrize("lengths", [(64, 19), (1, 1), (5, 37)], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image, text = (torch.randn(2, length, 3, 32).to(dtype) for length in lengths)
    parts = embedding(*lengths, 16)
    want = [transformer_qwenimage.apply_rotary_emb_qwen(x, e, use_real=False) for x, e in zip((text, image), parts[::-1], strict=True)]
    got = rotary.rotated([text, image], torch.cat(parts[::-1])[:, None])
    torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-5 if dtype == F32 else torch.finfo(dtype).eps, atol=1e-6)


def test_products_add_to_the_residual(rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("qwen_image")
    residuals: list[bool] = []
    product: Callable[..., Tensor] = ops.sparse_linear

    def watching(*args: Any) -> Tensor:
        residuals.append(args[10] is not None)
        return product(*args)

    monkeypatch.setattr(ops, "sparse_linear", watching)
    with torch.no_grad():
        model(**inputs)
    assert sum(residuals) == 4 * BLOCKS  # of image and text: attention's output, and the feed-forward
    residuals.clear()
    for block in model.transformer_blocks:
        block.attn.to_out[1].register_forward_hook(lambda *_: None)  # comes between
        block.attn.to_add_out.dense = True
    with torch.no_grad():
        model(**inputs)
    assert sum(residuals) == 2 * BLOCKS
    residuals.clear()
    model(**inputs)
    assert residuals and not any(residuals)  # a gradient would compute the product again


@pytest.mark.parametrize("samples", [1, 2])
def test_norms_take_in_the_modulation_of_one_sample(samples: int, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("qwen_image")[0], given(samples, "none")
    weights: list[bool] = []

    def watching(x: Tensor, shape: Any, weight: Tensor, *args: Any) -> Tensor:
        weights.append(weight is not None)
        return nn.functional.layer_norm(x, shape, weight, *args)

    monkeypatch.setattr(norms, "F", SimpleNamespace(layer_norm=watching, rms_norm=nn.functional.rms_norm))
    output(model, inputs)
    assert weights == [True] * (4 * BLOCKS if samples == 1 else 0)


def test_float16_is_clipped_where_diffusers_clips(rotations: list[int]) -> None:
    block, inputs = block_and_inputs(torch.float16)
    for mlp, modulation in ((block.img_mlp, block.img_mod), (block.txt_mlp, block.txt_mod)):
        nn.init.constant_(mlp.net[2].bias, 6e4)
        nn.init.constant_(modulation[1].bias, 3)
    with torch.no_grad():
        got = block(**inputs)
        want = as_diffusers_has_it(block, lambda: block(**inputs))
    assert len(rotations) == 2
    for mine, theirs in zip(got, want, strict=True):
        assert mine.isfinite().all() and (mine == 65504).any() and torch.equal(mine == 65504, theirs == 65504)


# ---- when diffusers' own code runs -------------------------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("qwen_image", torch.bfloat16)
    monkeypatch.setattr(qwen_image_attention, "attended", None)
    assert torch.equal(output(model, inputs), as_diffusers_has_it(model, lambda: output(model, inputs)))


@pytest.mark.parametrize("samples", [1, 2])
def test_tokens_with_different_modulations(samples: int, rotations: list[int]) -> None:
    """Qwen-Image-Edit-2511: the tokens of the image that is edited have a time of their own."""
    torch.manual_seed(0)
    options = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4}
    model = QwenImageTransformer2DModel(**options, joint_attention_dim=64, axes_dims_rope=(8, 12, 12), zero_cond_t=True).eval()
    rtlynx.apply(model)
    inputs = {**given(samples, "all"), "img_shapes": [[(1, 4, 8), (1, 4, 8)]] * samples}
    assert torch.equal(output(model, inputs), as_diffusers_has_it(model, lambda: output(model, inputs)))
    assert not rotations


@pytest.mark.parametrize("other", ["index", "zero_cond_t", "one time of two samples", "two times of one sample"])
def test_modulations_that_are_not_one_for_each_sample(other: str, rotations: list[int]) -> None:
    block, inputs = block_and_inputs(zero_cond_t=other == "zero_cond_t")
    if other != "two times of one sample":
        inputs |= {name: inputs[name].repeat(2, 1, 1) for name in ("hidden_states", "encoder_hidden_states")}
    if other != "one time of two samples":
        inputs["temb"] = torch.randn(2, 128)
    if other == "index":
        inputs["modulate_index"] = torch.arange(64).expand(2, 64) % 2
    with torch.no_grad():
        got = block(**inputs)
        want = as_diffusers_has_it(block, lambda: block(**inputs))
    assert all(map(torch.equal, got, want)) and not rotations


@pytest.mark.parametrize("other", ["real", "double precision", "half the channels", "one tensor", "other lengths", "none", "gradients"])
def test_other_embeddings_are_not_rotated_here(other: str, rotations: list[int]) -> None:
    block, inputs = block_and_inputs()
    image, text = inputs["image_rotary_emb"]
    changed: dict[str, Any] = {
        "real": (image.real, text.real),
        "double precision": (image.to(torch.complex128), text.to(torch.complex128)),
        "half the channels": (image[:, ::2], text[:, ::2]),
        "one tensor": torch.cat([text, image]),
        "other lengths": (image[:1], text),
        "none": None,
    }
    streams = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with torch.set_grad_enabled(other == "gradients"):
        assert not qwen_image_attention.is_written_here(block.attn, *streams, changed.get(other, (image, text)))
    with torch.no_grad():
        assert qwen_image_attention.is_written_here(block.attn, *streams, (image, text))
        if other in ("other lengths", "none"):  # those that diffusers takes as well
            inputs["image_rotary_emb"] = changed[other]
            got, want = block(**inputs), as_diffusers_has_it(block, lambda: block(**inputs))
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True)) and not rotations


def test_attention_without_norms(rotations: list[int]) -> None:
    block, inputs = block_and_inputs(qk_norm=None)
    with torch.no_grad():
        got, want = block(**inputs), as_diffusers_has_it(block, lambda: block(**inputs))
    assert len(rotations) == 2 and all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_another_processor_is_called(rotations: list[int]) -> None:
    class Mine(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
        calls = 0

        @functools.wraps(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0.__call__)  # Attention passes on what the signature names
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    model, inputs = sparse("qwen_image")
    want = output(model, inputs)
    model.set_attn_processor(Mine())
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert Mine.calls == BLOCKS and not rotations


def test_an_unknown_keyword_is_warned_of(rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("qwen_image")
    want, said = output(model, inputs), []
    monkeypatch.setattr(attention_processor.logger, "warning", said.append)
    got = output(model, {**inputs, "attention_kwargs": {"strength": 1}})
    assert relative_error(got, want) < 1e-5
    assert len(said) == BLOCKS and "['strength'] are not expected by QwenDoubleStreamAttnProcessor2_0" in said[0]


@pytest.mark.parametrize("change", range(len(qwen_image.QwenImageTransformerBlock.replaces)))
def test_a_new_name_in_diffusers_trips_the_guard(change: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def newer(self, hidden_states):  # type: ignore[no-untyped-def]
        return self.norm_of_another_kind(hidden_states)

    was = qwen_image.QwenImageTransformerBlock.replaces
    monkeypatch.setattr(qwen_image.QwenImageTransformerBlock, "replaces", (*was[:change], newer, *was[change + 1 :]))
    known.fused_class.cache_clear()
    with caplog.at_level(logging.INFO, "rtlynx"):
        model = rtlynx.apply(QWEN.build("cpu", F32))
    known.fused_class.cache_clear()
    block = model.transformer_blocks[0]
    assert type(block) is BLOCK and type(block.img_mlp).__module__.startswith("rtlynx")
    assert "QwenImageTransformerBlock stays as it is: its forward uses norm_of_another_kind" in caplog.text


# ---- what users do with the model --------------------------------------------------------------------------------------------------------


def test_hooks_run(rotations: list[int]) -> None:
    model, inputs = sparse("qwen_image")
    want = output(model, inputs)
    block = model.transformer_blocks[0]
    calls: list[str] = []
    within = ["attn.to_q", "attn.norm_q", "attn.norm_added_k", "attn.to_out.0", "attn.to_out.1", "attn.to_add_out"]
    names = [*within, "img_mod", "img_norm1", "txt_norm2", "img_mlp", "txt_mlp.net.2"]
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert sorted(calls) == sorted(names) and len(rotations) == 2 * BLOCKS
    block.attn.register_forward_hook(lambda *_: calls.append("attn"))
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert "attn" in calls and len(rotations) == 2 * (BLOCKS - 1)  # of a whole that has a hook nothing is written here


def test_controlnet_residuals(rotations: list[int]) -> None:
    model, inputs = sparse("qwen_image")
    torch.manual_seed(0)
    controlled = {**inputs, "controlnet_block_samples": [torch.randn(2, 64, 128)]}
    got = output(model, controlled)
    assert len(rotations) == 2 * BLOCKS and relative_error(got, output(model, inputs)) > 1e-2
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, controlled))) < 1e-5


def test_classes_come_and_go(rotations: list[int]) -> None:
    model, inputs = sparse("qwen_image")
    for twin in (model, copy.deepcopy(model)):
        assert all(type(block) is qwen_image.QwenImageTransformerBlock for block in twin.transformer_blocks)
        rtlynx.remove(twin)
        rotations.clear()
        assert torch.equal(output(twin, inputs), output(QWEN.build("cpu", F32), inputs)) and not rotations
        assert not any(type(module).__module__.startswith("rtlynx") for module in twin.modules())
