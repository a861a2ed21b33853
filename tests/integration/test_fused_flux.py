"""What FLUX.1's blocks do between their layers, in fewer passes: the same results, and diffusers' own code where it must be that."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_chroma, transformer_flux
from torch import Tensor, nn

import rtlynx
from fused_models import ALL, F32, as_diffusers_has_it, layers, sparse
from rtlynx import SparsityConfig, ops
from rtlynx.fusions import flux_attention, fusion, install_fusions, known, rotary, single_stream
from tiny_models import output, relative_error

BLOCKS = 1 + 2  # double-stream and single-stream
FUSED = {"FluxAttention": BLOCKS, "FluxTransformerBlock": 1}


def one_sample(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:1] if isinstance(value, Tensor) and len(value) == 2 else value for name, value in inputs.items()}


def embedding(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """As FLUX.1 gives it: every angle twice in a row."""
    angles = (100 * torch.randn(tokens, channels // 2)).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def test_products_add_to_the_residual_where_a_layer_comes_last(rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux")
    residuals: list[bool] = []
    product: Callable[..., Tensor] = ops.sparse_linear

    def watching(*args: Any) -> Tensor:
        residuals.append(args[10] is not None)
        return product(*args)

    monkeypatch.setattr(ops, "sparse_linear", watching)
    with torch.no_grad():
        model(**one_sample(inputs))
    assert sum(residuals) == 2 + 2  # the feed-forwards of image and text in the double-stream block, proj_out of the others
    residuals.clear()
    model(**one_sample(inputs))
    assert residuals and not any(residuals)  # a gradient would compute the product again


# ---- the rotation ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(37,), (19, 64), (0, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, samples: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(samples, length, 3, 32).to(dtype) for length in lengths]
    before = [part.clone() for part in parts]
    emb = embedding(sum(lengths), 32)
    got = rotary.rotated(parts, rotary.rotation(emb))
    want = embeddings.apply_rotary_emb(torch.cat(parts, 1), emb, sequence_dim=1)
    assert got.shape == want.shape and got.is_contiguous()
    # The products are the same; one of them may not be rounded before the sum.
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == F32 else torch.finfo(dtype).eps, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_a_rotation_of_parts_apart_in_memory() -> None:
    query, _, _ = torch.randn(2, 7, 3 * 64).chunk(3, -1)  # as fused projections give it
    heads, emb = query.unflatten(-1, (2, 32)), embedding(7, 32)
    torch.testing.assert_close(rotary.rotated([heads], rotary.rotation(emb)), embeddings.apply_rotary_emb(heads, emb, sequence_dim=1))


def test_what_flux_gives_is_what_is_rotated_by() -> None:
    ids = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).float()
    cos, sin = ALL["flux"].build("cpu", F32).pos_embed(ids)
    assert cos.dtype == sin.dtype == F32 and cos.shape == (60, 32)
    for each in (cos, sin):
        assert torch.equal(each[:, ::2], each[:, 1::2])


@pytest.mark.parametrize("other", ["one tensor", "samples", "half precision", "half the channels", "none", "gradients"])
def test_other_embeddings_are_not_rotated_here(other: str, rotations: list[int]) -> None:
    cos, sin = embedding(5, 32)
    given: dict[str, Any] = {
        "one tensor": torch.complex(cos, sin),
        "samples": (cos[None], sin[None]),
        "half precision": (cos.half(), sin.half()),
        "half the channels": (cos[:, ::2], sin[:, ::2]),
        "none": None,
    }
    x = torch.randn(1, 5, 64)
    with torch.set_grad_enabled(other == "gradients"):
        assert not rotary.rotates(x, given.get(other, (cos, sin)), 32)
    with torch.no_grad():
        assert rotary.rotates(x, (cos, sin), 32)


# ---- the blocks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projections", ["apart", "fused"])
def test_the_same_results(projections: str, dtype: torch.dtype, samples: int, rotations: list[int]) -> None:
    model, inputs = sparse("flux", dtype)
    if projections == "fused":
        model.fuse_qkv_projections()
    for layer in layers(model):  # what is selected may change with a last bit, and everything after it
        layer.dense = True
    inputs = inputs if samples == 2 else one_sample(inputs)
    got = output(model, inputs)
    assert rotations == [2, 2] + [1, 1] * 2
    want = as_diffusers_has_it(model, lambda: output(model, inputs))
    assert len(rotations) == 2 * BLOCKS
    assert relative_error(got, want) < (1e-5 if dtype == F32 else 1e-2)


def test_the_same_results_with_sparse_layers(rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    got = output(model, inputs)
    assert rotations == [2, 2] + [1, 1] * 2
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5
    install_fusions(model, False)
    assert relative_error(got, output(model, inputs)) < 1e-5
    assert len(rotations) == 2 * BLOCKS


def test_bfloat16_is_no_less_exact(rotations: list[int]) -> None:
    exact, inputs = ALL["flux"].build("cpu", torch.bfloat16).double(), ALL["flux"].inputs("cpu", torch.bfloat16)
    wide = {name: value.double() for name, value in inputs.items()}
    want = output(exact, wide)
    model = rtlynx.apply(ALL["flux"].build("cpu", torch.bfloat16))
    for layer in layers(model):
        layer.dense = True
    got = relative_error(output(model, inputs), want)
    assert got < 1.1 * relative_error(as_diffusers_has_it(model, lambda: output(model, inputs)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gated_sum_is_rounded_once(dtype: torch.dtype, rotations: list[int]) -> None:
    torch.manual_seed(0)
    residual, update = torch.randn(2, 9, 64).to(dtype), torch.randn(2, 9, 64).to(dtype)
    gate = torch.randn(2, 64).to(dtype)
    exact = residual.double() + gate[:, None].double() * update.double()
    got = fusion.add_gated(residual, gate, update)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (got - exact).norm() < (residual + gate[:, None] * update - exact).norm()


def test_float16_is_clipped_where_diffusers_clips(rotations: list[int]) -> None:
    model = rtlynx.apply(ALL["flux"].build("cpu", torch.float16))
    block = model.transformer_blocks[0]
    for name in ("ff", "ff_context"):
        nn.init.constant_(getattr(block, name).net[2].bias, 6e4)
    nn.init.constant_(block.norm1_context.linear.bias, 3)
    x, text, temb = torch.randn(1, 64, 128).half(), torch.randn(1, 19, 128).half(), torch.randn(1, 128).half()
    with torch.no_grad():
        got, _ = block(x, text, temb, tuple(embedding(83, 32)))
    assert len(rotations) == 2 and got.isfinite().all() and (got == 65504).any()


@pytest.mark.parametrize("projections", ["apart", "fused"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_the_same_results_of_flux2(dtype: torch.dtype, projections: str, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux2", dtype)
    if projections == "fused":
        model.fuse_qkv_projections()
    got = output(model, inputs)
    blocks = len(model.transformer_blocks), len(model.single_transformer_blocks)
    assert rotations == [2, 2] * blocks[0] + [1, 1] * blocks[1]
    monkeypatch.setattr(rotary, "rotates", lambda *_: False)
    want = output(model, inputs)
    assert len(rotations) == 2 * sum(blocks)
    # In bfloat16 what is selected may change with a last bit, and everything after it.
    assert relative_error(got, want) < (1e-5 if dtype == F32 else 0.15)
    rotations.clear()
    monkeypatch.undo()
    rtlynx.remove(model)
    assert not any(type(module).__module__.startswith("rtlynx") for module in model.modules())


@pytest.mark.parametrize("samples", [1, 2])
def test_what_lies_together_is_not_copied(samples: int, rotations: list[int]) -> None:
    whole = torch.randn(samples, 11, 64)
    text, image = whole[:, :3], whole[:, 3:]
    others = [(image, text), (text, image.clone()), (text, whole[:, 4:]), (text.clone(), image), (text, whole[:, 3:].half())]
    others += [(whole[:, :3, :32], whole[:, 3:, 32:]), (text, whole.repeat(1, 1, 2)[:, 3:, :64])]
    with torch.no_grad():
        got = single_stream.joined(text, image)
        assert got.data_ptr() == whole.data_ptr() and torch.equal(got, whole)
        for first, second in others:
            got = single_stream.joined(first, second)
            assert torch.equal(got, torch.cat([first, second], 1)) and got.data_ptr() != first.data_ptr()
    assert single_stream.joined(text, image).data_ptr() != whole.data_ptr()  # with gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_single_stream_blocks_hand_on_what_lies_together(mode: Any, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux")
    copies: list[bool] = []
    adjacent = single_stream._adjacent

    def watching(first: Tensor, second: Tensor) -> bool:
        copies.append(not adjacent(first, second))
        return not copies[-1]

    monkeypatch.setattr(single_stream, "_adjacent", watching)
    with mode():
        model(**inputs)
        assert copies == [True, False]  # the double-stream blocks' are apart
        model(**inputs, controlnet_single_block_samples=[torch.randn(2, 64, 128)])
    assert copies == [True, False, True, True]


@pytest.mark.parametrize("mask", [False, True])
def test_chromas_attention(mask: bool, rotations: list[int]) -> None:
    torch.manual_seed(0)
    double, single = (getattr(transformer_chroma, f"Chroma{kind}TransformerBlock")(128, 4, 32) for kind in ("", "Single"))
    blocks = rtlynx.apply(nn.ModuleList([double, single]).eval(), SparsityConfig(include=("**.proj_out", "**.to_q"), share_inputs=False))
    x, text, emb = torch.randn(2, 8, 128), torch.randn(2, 3, 128), embedding(11, 32)
    present = torch.rand(2, 11) < 0.7 if mask else None

    def run() -> Tensor:
        with torch.no_grad():
            a, b = double(x, text, torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(1)), emb, present)
            return single(torch.cat([a, b], 1), torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(2)), emb, present)  # type: ignore[no-any-return]

    got = run()
    assert rotations == [2, 2, 1, 1]
    install_fusions(blocks, False)
    torch.testing.assert_close(got, run(), rtol=1e-4, atol=1e-5)
    assert len(rotations) == 4


# ---- when diffusers' own code runs -------------------------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux", torch.bfloat16)
    monkeypatch.setattr(rotary, "rotation", None)
    assert torch.equal(output(model, inputs), as_diffusers_has_it(model, lambda: output(model, inputs)))


def test_another_processor_is_called(rotations: list[int]) -> None:
    class Mine(transformer_flux.FluxAttnProcessor):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    model, inputs = sparse("flux")
    want = output(model, inputs)
    model.set_attn_processor(Mine())
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert Mine.calls == BLOCKS and not rotations


def test_an_ip_adapter(rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    want = output(model, inputs)
    attention = model.transformer_blocks[0].attn
    torch.manual_seed(0)
    attention.set_processor(transformer_flux.FluxIPAdapterAttnProcessor(128, 48, num_tokens=(4,)))
    given = {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 48)]}}
    rotations.clear()
    got = output(model, given)
    assert not rotations  # its keyword argument reaches every attention
    assert relative_error(got, want) > 1e-3
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, given))) < 1e-5


def test_an_unknown_keyword_is_warned_of(rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux")
    want, said = output(model, inputs), []
    monkeypatch.setattr(transformer_flux.logger, "warning", said.append)
    got = output(model, {**inputs, "joint_attention_kwargs": {"strength": 1}})
    assert relative_error(got, want) < 1e-5
    assert len(said) == BLOCKS and "['strength'] are not expected by FluxAttnProcessor" in said[0]


@pytest.mark.parametrize("change", ["forward", "processor", "rotary embedding", "block"])
def test_a_new_name_in_diffusers_trips_the_guard(change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def newer(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):  # type: ignore[no-untyped-def]
        return self.norm_of_another_kind(hidden_states)

    known.fused_class.cache_clear()
    if change == "block":
        monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", newer)
    else:
        was = flux_attention.FluxAttention.replaces
        at = ["forward", "processor", "rotary embedding"].index(change)
        monkeypatch.setattr(flux_attention.FluxAttention, "replaces", (*was[:at], newer, *was[at + 1 :]))
    with caplog.at_level(logging.INFO, "rtlynx"):
        model = rtlynx.apply(ALL["flux"].build("cpu", F32))
    known.fused_class.cache_clear()
    cls = transformer_flux.FluxTransformerBlock if change == "block" else transformer_flux.FluxAttention
    block = model.transformer_blocks[0]
    assert type(block if change == "block" else block.attn) is cls and type(block.attn if change == "block" else block) is not cls
    assert f"{cls.__name__} stays as it is: its forward uses norm_of_another_kind" in caplog.text


# ---- what users do with the model --------------------------------------------------------------------------------------------------------


def test_hooks_run(rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    want = output(model, inputs)
    block = model.transformer_blocks[0]
    calls: list[str] = []
    names = ["attn", "attn.norm_q", "attn.norm_added_k", "attn.to_out.0", "attn.to_out.1", "attn.to_add_out", "norm2_context", "ff"]
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    assert relative_error(output(model, inputs), want) < 1e-5  # the hook keeps norm2_context from being merged with its modulation
    assert sorted(calls) == sorted(names)


def test_controlnet_residuals(rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    torch.manual_seed(0)
    residuals = [torch.randn(2, 64, 128)]
    given = {**inputs, "controlnet_block_samples": residuals, "controlnet_single_block_samples": residuals}
    got = output(model, given)
    assert len(rotations) == 2 * BLOCKS and relative_error(got, output(model, inputs)) > 1e-2
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, given))) < 1e-5


def test_classes_come_and_go(rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    for twin in (model, copy.deepcopy(model)):
        kinds = [type(module) for module in twin.modules() if type(module).__name__ in FUSED]
        assert len(kinds) == sum(FUSED.values()) and all(kind.__module__.startswith("rtlynx.fusions.") for kind in kinds)
        rtlynx.remove(twin)
        rotations.clear()
        assert torch.equal(output(twin, inputs), output(ALL["flux"].build("cpu", F32), inputs)) and not rotations
        assert not any(type(module).__module__.startswith("rtlynx") for module in twin.modules())
