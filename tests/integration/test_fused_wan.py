"""What Wan's blocks do between their layers, in fewer passes: the same results, and diffusers' own code where it must be that."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

import rtlynx
from fused_models import ALL, F32, as_diffusers_has_it, layers, sparse, unfused
from rtlynx import SparsityConfig, ops
from rtlynx.fusions import known, rotary, wan, wan_attention
from tiny_models import output, relative_error, wan_as_loaded

BLOCKS = 2
WAN = ALL["wan"]
BLOCK = transformer_wan.WanTransformerBlock
LIMIT = {F32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the relative error: roundings of the dtype."""


def given(samples: int, time: str = "of a sample", dtype: torch.dtype = F32) -> dict[str, Any]:
    inputs = {name: value[:samples] for name, value in WAN.inputs("cpu", dtype).items()}
    if time == "of a token":  # Wan 2.2's 5B model
        inputs["timestep"] = torch.arange(samples * 3 * 4 * 4).reshape(samples, -1) % 1000
    return inputs


def embedding(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """As Wan gives it: every angle twice in a row."""
    angles = (100 * torch.randn(1, tokens, 1, channels // 2)).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


def block_and_inputs(dtype: torch.dtype = F32, **options: Any) -> tuple[Any, dict[str, Any]]:
    """One fused block whose layers are dense, and what it takes for one sample."""
    torch.manual_seed(0)
    block = BLOCK(128, 256, 4, **{"cross_attn_norm": True, **options}).to(dtype).eval()
    rtlynx.apply(nn.ModuleList([block]), SparsityConfig(include=("**.to_q", "**.net.2"), share_inputs=False))
    for layer in layers(block):
        layer.dense = True
    return block, {
        "hidden_states": torch.randn(1, 64, 128).to(dtype),
        "encoder_hidden_states": torch.randn(1, 19, 128).to(dtype),
        "temb": torch.randn(1, 6, 128).to(dtype),
        "rotary_emb": embedding(64, 32),
    }


def both(block: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return block(**inputs), as_diffusers_has_it(block, lambda: block(**inputs))


# ---- the same results --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["nothing", "norms and modulation"])
@pytest.mark.parametrize("time", ["of a sample", "of a token"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_the_same_results(dtype: torch.dtype, samples: int, time: str, kept: str, rotations: list[int]) -> None:
    model, inputs = sparse("wan", dtype)[0], given(samples, time, dtype)
    if kept != "nothing":
        wan_as_loaded(model, "cpu")
    for layer in layers(model):  # what is selected may change with a last bit, and everything after it
        layer.dense = True
    got = output(model, inputs)
    assert rotations == [1, 1] * BLOCKS
    want = as_diffusers_has_it(model, lambda: output(model, inputs))
    assert len(rotations) == 2 * BLOCKS
    assert got.dtype == want.dtype and relative_error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("time", ["of a sample", "of a token"])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_results_with_sparse_layers(samples: int, time: str, rotations: list[int]) -> None:
    model, inputs = sparse("wan")[0], given(samples, time)
    got = output(model, inputs)
    assert rotations == [1, 1] * BLOCKS
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5
    assert relative_error(got, unfused(model, inputs)) < 1e-5
    assert len(rotations) == 2 * BLOCKS


@pytest.mark.parametrize("samples", [1, 2])
def test_text_to_video(samples: int, rotations: list[int]) -> None:
    torch.manual_seed(0)
    config = {**WAN.build("meta", F32).config, "image_dim": None, "added_kv_proj_dim": None}
    model = rtlynx.apply(WanTransformer3DModel.from_config(config).eval())
    inputs = {name: value for name, value in given(samples).items() if name != "encoder_hidden_states_image"}
    got = output(model, inputs)
    assert rotations == [1, 1] * BLOCKS
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5


@pytest.mark.parametrize("kept", ["nothing", "norms and modulation"])
def test_bfloat16_is_no_less_exact(kept: str, rotations: list[int]) -> None:
    model, inputs = WAN.build("cpu", torch.bfloat16), given(1, dtype=torch.bfloat16)
    if kept != "nothing":
        wan_as_loaded(model, "cpu")
    exact = copy.deepcopy(model).double()
    want = output(exact, {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()})
    rtlynx.apply(model)
    for layer in layers(model):
        layer.dense = True
    got = relative_error(output(model, inputs), want)
    assert got < 1.1 * relative_error(as_diffusers_has_it(model, lambda: output(model, inputs)), want)


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_a_rotation_is_that_of_diffusers(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(2, tokens, 3, 32).to(dtype), embedding(tokens, 32)
    # As its processor has it, in a function of its own within.
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cos[..., 0::2], sin[..., 1::2]
    want = torch.stack([x1 * cosines - x2 * sines, x1 * sines + x2 * cosines], -1).flatten(-2).type_as(x)
    got = rotary.rotated([x], wan_attention._rotation(cos, sin))
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == F32 else torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("time", ["of a sample", "of a token"])
def test_products_add_to_the_residual(time: str, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("wan")[0], given(2, time)
    residuals: list[bool] = []
    product: Callable[..., Tensor] = ops.sparse_linear

    def watching(*args: Any) -> Tensor:
        residuals.append(args[10] is not None)
        return product(*args)

    monkeypatch.setattr(ops, "sparse_linear", watching)
    with torch.no_grad():
        model(**inputs)
    gated = time == "of a sample"  # a product has no gate for each token
    assert sum(residuals) == (3 if gated else 1) * BLOCKS  # both attentions' outputs, and the feed-forward
    residuals.clear()
    for block in model.blocks:
        block.attn1.to_out[1].register_forward_hook(lambda *_: None)  # comes between
        block.attn2.to_out[0].dense = True
    with torch.no_grad():
        model(**inputs)
    assert sum(residuals) == (BLOCKS if gated else 0)
    residuals.clear()
    model(**inputs)
    assert residuals and not any(residuals)  # a gradient would compute the product again


@pytest.mark.parametrize("weights", [F32, torch.bfloat16], ids=str)
def test_what_is_float32_stays_it(weights: torch.dtype, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = block_and_inputs(torch.bfloat16)
    block.norm2.to(weights)
    taken: list[set[torch.dtype]] = []
    addcmul = torch.addcmul

    def watching(*args: Tensor, **kwargs: Any) -> Tensor:
        taken.append({each.dtype for each in args})
        return addcmul(*args, **kwargs)

    monkeypatch.setattr(torch, "addcmul", watching)
    got, want = both(block, inputs)
    assert taken == [{F32, torch.bfloat16}] * (5 if weights == F32 else 4)  # two modulations, two gates, and the norm between them
    assert got.dtype == want.dtype == torch.bfloat16 and relative_error(got, want) < 1e-2


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_strided_hidden_states(dtype: torch.dtype, rotations: list[int]) -> None:
    """As older versions of diffusers give them to the first block."""
    block, inputs = block_and_inputs(dtype)
    inputs["hidden_states"] = inputs["hidden_states"].mT.contiguous().mT
    got, want = both(block, inputs)
    assert len(rotations) == 2 and got.is_contiguous() and relative_error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("norm", ["none", "another", "wrapped"])
def test_other_norms_are_called(norm: str, rotations: list[int]) -> None:
    block, inputs = block_and_inputs(torch.bfloat16, cross_attn_norm=norm != "none")
    if norm == "another":
        block.norm1, block.norm2, block.norm3 = (nn.LayerNorm(128) for _ in range(3))
    if norm == "wrapped":
        for each in (block.norm1, block.norm2, block.norm3):
            accelerate.hooks.add_hook_to_module(each, accelerate.hooks.ModelHook())
    got, want = both(block, inputs)
    assert len(rotations) == 2 and relative_error(got, want) < 1e-2


# ---- when diffusers' own code runs -------------------------------------------------------------------------------------------------------


def test_on_the_cpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("wan", torch.bfloat16)
    monkeypatch.setattr(wan_attention, "attended", None)
    assert torch.equal(output(model, inputs), as_diffusers_has_it(model, lambda: output(model, inputs)))


@pytest.mark.parametrize(
    "other", ["double precision", "half the channels", "one tensor", "other lengths", "an angle for each sample", "gradients", "parallel"]
)
def test_other_embeddings_are_not_rotated_here(other: str, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = block_and_inputs()
    cos, sin = inputs["rotary_emb"]
    changed: dict[str, Any] = {
        "double precision": (cos.double(), sin.double()),
        "half the channels": (cos[..., ::2], sin[..., ::2]),
        "one tensor": torch.cat([cos, sin]),
        "other lengths": (cos[:, :1], sin[:, :1]),
        "an angle for each sample": (cos.repeat(2, 1, 1, 1), sin.repeat(2, 1, 1, 1)),
    }
    with torch.no_grad():
        assert wan_attention.is_written_here(block.attn1, inputs["hidden_states"], (cos, sin))
    if other == "parallel":
        monkeypatch.setattr(block.attn1.processor, "_parallel_config", object(), raising=False)
    with torch.set_grad_enabled(other == "gradients"):
        assert not wan_attention.is_written_here(block.attn1, inputs["hidden_states"], changed.get(other, (cos, sin)))
    if other in ("double precision", "other lengths"):  # those that diffusers takes as well
        inputs["rotary_emb"] = changed[other]
        got, want = both(block, inputs)
        assert relative_error(got, want) < 1e-5 and not rotations


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of diffusers' norms of queries and keys
def test_autocast(rotations: list[int]) -> None:
    block, inputs = block_and_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = both(block, inputs)
    assert relative_error(got, want) < 1e-2


def test_another_processor_is_called(rotations: list[int]) -> None:
    class Mine(transformer_wan.WanAttnProcessor):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    model, inputs = sparse("wan")
    want = output(model, inputs)
    model.set_attn_processor(Mine())
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert Mine.calls == 2 * BLOCKS and not rotations


@pytest.mark.parametrize("change", ["block", 0, 1, "within"])
def test_a_new_name_in_diffusers_trips_the_guard(
    change: str | int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def newer(self, hidden_states):  # type: ignore[no-untyped-def]
        return self.norm_of_another_kind(hidden_states)

    def newer_within(self, hidden_states):  # type: ignore[no-untyped-def]
        def apply_rotary_emb(hidden_states):  # type: ignore[no-untyped-def]
            return hidden_states.norm_of_another_kind()

        return apply_rotary_emb(hidden_states)

    was = wan_attention.WanAttention.replaces
    if change == "block":
        monkeypatch.setattr(wan.WanTransformerBlock, "replaces", newer, raising=False)
    elif change == "within":
        monkeypatch.setattr(wan_attention.WanAttention, "replaces", (was[0], newer_within))
    else:
        monkeypatch.setattr(wan_attention.WanAttention, "replaces", (*was[:change], newer, *was[change + 1 :]))  # type: ignore[operator, misc]
    known.fused_class.cache_clear()
    with caplog.at_level(logging.INFO, "rtlynx"):
        model = rtlynx.apply(WAN.build("cpu", F32))
    known.fused_class.cache_clear()
    block = model.blocks[0]
    cls = BLOCK if change == "block" else transformer_wan.WanAttention
    assert type(block if change == "block" else block.attn1) is cls and type(block.attn1 if change == "block" else block) is not cls
    assert f"{cls.__name__} stays as it is: its forward uses norm_of_another_kind" in caplog.text


def test_attention_that_is_diffusers_own_in_a_fused_block(rotations: list[int]) -> None:
    model, inputs = sparse("wan")
    want = output(model, inputs)
    for block in model.blocks:
        block.attn1.__class__ = block.attn2.__class__ = transformer_wan.WanAttention
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5 and not rotations


# ---- what users do with the model --------------------------------------------------------------------------------------------------------


def test_hooks_run(rotations: list[int]) -> None:
    model, inputs = sparse("wan")
    want = output(model, inputs)
    block = model.blocks[0]
    calls: list[str] = []
    within = ["attn1.to_q", "attn1.norm_q", "attn2.norm_added_k", "attn2.add_v_proj", "attn1.to_out.0", "attn2.to_out.1"]
    names = [*within, "norm1", "norm2", "norm3", "ffn", "ffn.net.2"]
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5
    assert sorted(calls) == sorted(names) and len(rotations) == 2 * BLOCKS
    for name in ("attn1", "attn2"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    assert relative_error(output(model, inputs), want) < 1e-5
    assert {"attn1", "attn2"} < set(calls)


def test_fused_projections(rotations: list[int]) -> None:
    model, inputs = sparse("wan")
    for block in model.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    got = output(model, inputs)
    assert len(rotations) == 2 * BLOCKS
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5


def test_the_blocks_of_vace_call_the_attention(rotations: list[int]) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 32}
    model = WanVACETransformer3DModel(**sizes, ffn_dim=256, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=8).eval()
    rtlynx.apply(model, SparsityConfig(include=("**.to_q", "**.net.2")))
    inputs = {name: value for name, value in given(1).items() if name != "encoder_hidden_states_image"}
    inputs |= {"control_hidden_states": torch.randn(1, 8, 3, 8, 8), "control_hidden_states_scale": torch.ones(1)}
    got = output(model, inputs)
    assert len(rotations) == 2 * (2 + 1)
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5


def test_classes_come_and_go(rotations: list[int]) -> None:
    model, inputs = sparse("wan")
    for twin in (model, copy.deepcopy(model)):
        assert all(type(block) is wan.WanTransformerBlock for block in twin.blocks)
        assert all(type(block.attn2) is wan_attention.WanAttention for block in twin.blocks)
        rtlynx.remove(twin)
        rotations.clear()
        assert torch.equal(output(twin, inputs), output(WAN.build("cpu", F32), inputs)) and not rotations
        assert not any(type(module).__module__.startswith("rtlynx") for module in twin.modules())
