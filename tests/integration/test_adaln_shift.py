"""Selection without adaLN's shift: the dense function stays what it is, the sparse one selects anew, and all else goes on as before."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import rtlynx
from rtlynx import CompensationMismatchError, InvalidArgumentError, SparseLinear, SparsityConfig
from rtlynx.adaln_shift import adaln_layers, shift_in_input
from rtlynx.calibrate.collect import all_dense
from rtlynx.eligibility import sparse_layers
from tiny_families import FAMILIES
from tiny_models import NEIGHBOURS, TINY, output, relative_error

PLAIN = SparsityConfig(rank=0, branch="none", small_m="sparse")
SHIFTED = SparsityConfig(rank=0, branch="none", small_m="sparse", adaln_shift=True)
MODELS = {**TINY, **NEIGHBOURS, **FAMILIES}
FED = {
    **dict.fromkeys(("flux", "longcat_image", "ovis_image"), 8 + 2 * 4),
    "sd3": 11 + 8 + 4,
    "qwen_image": 2 * 8,
    **dict.fromkeys(("hunyuan_video", "hunyuan_video_framepack", "hunyuan_image"), 8 + 2 * 4),
    "hunyuan_video_15": 2 * 8,
}
"""Of the tiny models: how many layers read a shift."""


def modulated(name: str, config: SparsityConfig) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A tiny model with shifts worth taking away, sparse; its inputs, and what it gave before."""
    model, inputs = MODELS[name].build("cpu", torch.float32), MODELS[name].inputs("cpu", torch.float32)
    dense = output(model, inputs)
    return rtlynx.apply(model, config), inputs, dense


@pytest.mark.parametrize("name", sorted(FED))
@pytest.mark.parametrize("fuse", [True, False])
def test_the_dense_function_stays_and_the_selection_does_not(name: str, fuse: bool) -> None:
    model, inputs, dense = modulated(name, PLAIN)
    sparse = output(model, inputs)
    rtlynx.apply(model, SparsityConfig(rank=0, branch="none", small_m="sparse", adaln_shift=True, fuse=fuse))
    assert len(adaln_layers(model)) == FED[name]
    shifted = output(model, inputs)
    with all_dense(sparse_layers(model)):
        assert relative_error(output(model, inputs), dense) < 1e-5
    assert relative_error(shifted, sparse) > 1e-4
    for layer in sparse_layers(model).values():
        layer.dense = True
    assert torch.equal(output(model, inputs), dense)
    for layer in sparse_layers(model).values():
        layer.dense = False
    rtlynx.remove(model)
    assert torch.equal(output(model, inputs), dense)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_selected_from_has_no_shift_and_is_shared(selections: list[Tensor]) -> None:
    model, inputs, _ = modulated("flux", PLAIN)
    output(model, inputs)
    before, selections[:] = list(selections), []
    rtlynx.apply(model, SHIFTED)
    output(model, inputs)
    assert len(selections) == len(before)
    block = model.transformer_blocks[0]
    seen: list[Tensor] = []
    block.norm1.linear.register_forward_hook(lambda m, args, y: seen.append(y.chunk(6, 1)[0]))
    selections.clear()
    output(model, inputs)
    shift = seen[0].repeat_interleave(len(before[0]) // len(seen[0]), 0)
    torch.testing.assert_close(selections[0], before[0] - shift)  # q, k and v of the image, which are the first


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("samples", [1, 3])
def test_selection_takes_the_shift_away_as_a_pass_before_it_would(rank: int, samples: int, selections: list[Tensor]) -> None:
    model, _, _ = modulated("flux", SparsityConfig(rank=rank, branch="dropped" if rank else "none", small_m="sparse", adaln_shift=True))
    names = [f"transformer_blocks.0.attn.to_{kind}" for kind in "qkv"]
    layers = [adaln_layers(model)[name] for name in names]
    x, shift = torch.randn(samples, 5, 128), torch.randn(samples, 128)
    down = torch.randn(128, rank) if rank else None
    for layer in layers:
        up = torch.randn(layer.out_features, rank) if rank else None
        layer.set_compensation(down, up, comp_bias=torch.randn(layer.out_features))
    with shift_in_input(layers, shift):
        got = [layer(x) for layer in layers]
    (once,) = selections
    assert torch.equal(once, (x - shift.unsqueeze(1)).flatten(0, 1))
    watched = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    seen: list[Tensor] = []
    with shift_in_input(layers, shift):
        want = [layer(x) for layer in layers]
    assert all(torch.equal(one, x - shift.unsqueeze(1)) for one in seen) and len(seen) == len(watched)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert torch.equal(selections[1], once) and len(selections) == 2


@torch.no_grad()
def test_a_call_that_others_than_the_layer_serve_is_given_back_nothing() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    layer = model.transformer_blocks[0].attn.to_q
    x, shift = torch.randn(2, 5, 128), torch.randn(2, 128)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with shift_in_input([layer], shift):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    layer.forward = fail
    with pytest.raises(RuntimeError, match="no memory"):
        output(model, inputs)
    del layer.forward
    assert not layer.shift_reader.left_to_layer
    rtlynx.apply(model, PLAIN)
    want = layer(x)
    rtlynx.apply(model, SHIFTED)
    assert torch.equal(layer.forward(x), want)


def test_a_layer_alone_is_not_shifted() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    output(model, inputs)
    layer, x = next(iter(adaln_layers(model).values())), torch.randn(5, 128)
    with torch.no_grad():
        got = layer(x)
        rtlynx.apply(model, PLAIN)
        assert torch.equal(got, layer(x)) and not layer._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(FED))
def test_a_layer_alone_may_be_told_of_a_shift(name: str, selections: list[Tensor]) -> None:
    model, _, _ = modulated(name, SHIFTED)
    fed, alone = adaln_layers(model), SparseLinear(128, 64, config=PLAIN)
    layers = [next(layer for key, layer in fed.items() if key.endswith(kind)) for kind in ("attn.to_q", "attn.to_k", "attn.to_v")]
    x, shift = torch.randn(2, 5, layers[0].in_features), torch.randn(2, layers[0].in_features)
    left = [layer(x - shift.unsqueeze(1)) for layer in layers]
    want = [y + nn.functional.linear(shift, layer.weight).unsqueeze(1) for y, layer in zip(left, layers, strict=True)]
    for _ in range(2):
        selections.clear()
        with shift_in_input([*layers, alone], shift):
            got = [layer(x) for layer in layers]
            assert alone(torch.randn(2, 5, 128)).shape == (2, 5, 64)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert len(selections) == 2  # one for q, k and v
    with shift_in_input(layers, shift), all_dense(fed):
        for layer in layers:
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert all(layer.shift_reader is not None and layer.shift_reader.shifts.last is None for layer in layers)
    assert all(torch.equal(layer(x - shift.unsqueeze(1)), y) for layer, y in zip(layers, left, strict=True))


def test_dense_steps_are_the_dense_models_to_the_bit() -> None:
    model, inputs, dense = modulated("flux", SparsityConfig(rank=0, branch="none", small_m="sparse", adaln_shift=True, dense_first=1.0))
    assert torch.equal(output(model, inputs), dense)


def test_layers_with_too_few_tokens_are_the_dense_ones_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, dense = modulated("flux", SparsityConfig(rank=0, branch="none", adaln_shift=True))
    monkeypatch.setattr(SparseLinear, "least_tokens", lambda self, device: 1000)
    assert torch.equal(output(model, inputs), dense)


def test_nothing_stays_in_memory_when_a_block_has_run() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    output(model, inputs)
    readers = [layer.shift_reader for layer in adaln_layers(model).values()]
    assert all(reader is not None and reader.shifts.now == () and reader.shifts.last is None for reader in readers)


def test_gradient_checkpointing_recomputes_it() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        hidden = inputs["hidden_states"].clone().requires_grad_()
        model.train()(**{**inputs, "hidden_states": hidden}, return_dict=False)[0].square().sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


def test_an_input_may_be_named() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    want = output(model, inputs)
    for layer in adaln_layers(model).values():
        call = type(layer).__call__
        layer.__class__ = type("Named", (type(layer),), {"__call__": lambda self, x, call=call: call(self, input=x)})
    assert torch.equal(output(model, inputs), want)


def test_without_a_layer_that_reads_one_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["flux"].build("cpu", torch.float32)
    with caplog.at_level("WARNING", "rtlynx"):
        rtlynx.apply(model, SparsityConfig(include=("**.net.2",), adaln_shift=True))
    assert "adaln_shift: no sparse layer of FluxTransformer2DModel reads a shift of adaLN" in caplog.text
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compensation_is_fitted_to_it_and_goes_with_it(tmp_path: Path) -> None:
    config = SparsityConfig(rank=16, small_m="sparse", adaln_shift=True)
    model, inputs, dense = modulated("flux", config)
    rtlynx.calibrate(model, run=lambda: output(model, inputs), output=tmp_path / "c.safetensors", progress=False)
    fitted = output(model, inputs)
    assert relative_error(fitted, dense) < relative_error(output(*modulated("flux", PLAIN)[:2]), dense)
    other = MODELS["flux"].build("cpu", torch.float32)
    rtlynx.load_compensation(other, tmp_path / "c.safetensors")
    torch.testing.assert_close(output(other, inputs), fitted)
    assert adaln_layers(other).keys() == {name for name, layer in sparse_layers(other).items() if layer.shift_reader is not None}
    rtlynx.apply(other, SparsityConfig(rank=16, small_m="sparse"))  # it is not right without
    assert not any(layer.rank for layer in sparse_layers(other).values())
    with pytest.raises(CompensationMismatchError, match="adaln_shift=True"):
        rtlynx.load_compensation(other, tmp_path / "c.safetensors")


def test_copies_and_pickles_have_hooks_of_their_own() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    want = output(model, inputs)
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    for twin in (copy.deepcopy(model), torch.load(memory, weights_only=False)):
        assert torch.equal(output(twin, inputs), want)
        rtlynx.apply(twin, PLAIN)
        assert not any(layer._forward_hooks for layer in sparse_layers(twin).values()) and not torch.equal(output(twin, inputs), want)
        assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("name", sorted(FED))
@pytest.mark.parametrize("whole", [False, True])
def test_models_compile_without_a_break(name: str, whole: bool) -> None:
    if whole and name == "hunyuan_video_15":
        pytest.skip("diffusers' own forward asks whether there is a picture, outside of the blocks")
    if whole and name == "hunyuan_video_framepack" and torch.__version__ < "2.9":
        pytest.skip("diffusers' own forward slices by a tensor, outside of the blocks, which torch 2.8 does not trace")
    torch._dynamo.reset()
    model, inputs, _ = modulated(name, SHIFTED)
    want = output(model, inputs)
    if whole:
        model.compile(fullgraph=True, backend="eager")
    elif model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")  # type: ignore[operator]
    else:
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(output(model, inputs), want)
    torch.testing.assert_close(output(model, inputs), want)


def test_fused_projections_follow() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    want = output(model, inputs)
    model.fuse_qkv_projections()  # type: ignore[operator]
    assert sparse_layers(model)["transformer_blocks.0.attn.to_qkv"].shift_reader is not None
    torch.testing.assert_close(output(model, inputs), want)
    model.unfuse_qkv_projections()  # type: ignore[operator]
    assert torch.equal(output(copy.deepcopy(model), inputs), want)  # nothing of what was fused is left to copy
    rtlynx.apply(model, PLAIN)
    assert not any(layer._forward_hooks for layer in sparse_layers(model).values())


def test_adapters_on_the_modulation_come_and_go() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    want = output(model, inputs)
    model = rtlynx.remove(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["norm1.linear", "norm.linear"], init_lora_weights=False))  # type: ignore[operator]
    rtlynx.apply(model, SHIFTED)
    model.unload_lora()  # type: ignore[operator]
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(output(each, inputs), want)


def test_adapters_read_the_whole_input() -> None:
    model, inputs, dense = modulated("flux", SHIFTED)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "norm1.linear"], init_lora_weights=False))  # type: ignore[operator]
    with all_dense(sparse_layers(model)):
        got = output(model, inputs)
    rtlynx.apply(model, PLAIN)
    with all_dense(sparse_layers(model)):
        torch.testing.assert_close(got, output(model, inputs), rtol=1e-4, atol=1e-5)
    assert relative_error(got, dense) > 1e-3


def test_offloaded_weights_are_there_when_they_are_needed() -> None:
    model, inputs, _ = modulated("flux", SHIFTED)
    want = output(model, inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(iter(adaln_layers(model).values())).weight.is_meta
    torch.testing.assert_close(output(model, inputs), want)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - FED.keys()))
def test_a_model_without_known_shifts_is_refused_and_stays(name: str) -> None:
    model = MODELS[name].build("cpu", torch.float32)
    with pytest.raises(InvalidArgumentError, match="apply: argument `config`: got adaln_shift=True for "):
        rtlynx.apply(model, SHIFTED)
    assert not sparse_layers(model)
