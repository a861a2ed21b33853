"""What users do with a model, on one with sparse layers: batches, offloading, casting, caches, copies, export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxControlNetModel
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from tiny_models import TINY, output, relative_error

F32 = torch.float32
FLUX = TINY["flux"]
INPUTS = FLUX.inputs("cpu", F32)
families = pytest.mark.parametrize("family", TINY)


def sparse_flux(dtype: torch.dtype = F32, **config: Any) -> Any:
    """A small FLUX with sparse layers that have a branch."""
    model = rtlynx.apply(FLUX.build("cpu", dtype), SparsityConfig(rank=16, **config))
    rng = torch.Generator()
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            k, n = layer.in_features, layer.out_features
            rng.manual_seed(k)  # layers that read one tensor share their comp_down
            layer.set_compensation(torch.randn(k, 16, generator=rng) / k**0.5, torch.randn(n, 16, generator=rng) / 9)
    return model


# ---- shapes ------------------------------------------------------------------------------------------------------------------------------


@families
def test_samples_of_a_batch_do_not_see_each_other(family: str) -> None:
    # as with classifier-free guidance, in one batch or in two forwards
    model, inputs = rtlynx.apply(TINY[family].build("cpu", F32)), TINY[family].inputs("cpu", F32)
    both = output(model, inputs)

    def sample(i: int) -> dict[str, Any]:
        return {**inputs, **{key: value[i : i + 1] for key, value in inputs.items() if len(value) == 2}}

    for i in range(2):
        torch.testing.assert_close(output(model, sample(i))[0], both[i], rtol=1e-3, atol=1e-3)


def test_images_and_prompts_of_different_sizes() -> None:
    model, dense = sparse_flux(), FLUX.build("cpu", F32)
    for side, text in ((8, 19), (4, 3), (12, 64), (8, 1)):
        inputs = FLUX.inputs("cpu", F32, side=side, text=text)  # type: ignore[call-arg]
        got, want = output(model, inputs), output(dense, inputs)
        assert got.shape == want.shape and relative_error(got, want) < 0.8


def test_compiled_blocks_serve_every_size() -> None:
    model = sparse_flux()
    sizes = [FLUX.inputs("cpu", F32, side=side, text=text) for side, text in ((8, 19), (6, 7), (10, 30), (4, 12))]  # type: ignore[call-arg]
    want = [output(model, inputs) for inputs in sizes]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for i, inputs in enumerate(sizes):  # the second size makes sizes symbolic
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            torch.testing.assert_close(output(model, inputs), want[i], rtol=1e-4, atol=1e-4)


# ---- where weights are -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"selection": "weight"}, {"precision": "fp8"}], ids=str)
def test_sequential_offloading(config: dict[str, Any]) -> None:
    model = sparse_flux(**config)
    want = output(model, INPUTS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert model.transformer_blocks[0].attn.to_q.weight.is_meta
    for _ in range(2):
        assert torch.equal(output(model, INPUTS), want)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(output(model, INPUTS), want)


def test_after_offloading_it_is_too_late(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_flux(selection="weight")
    score = model.transformer_blocks[0].attn.to_q.score.clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(rtlynx.InvalidArgumentError, match="hook"):
        rtlynx.remove(model)
    rtlynx.refresh(model)
    assert f"weights of {FLUX.sparse_layers} layers are offloaded" in caplog.text
    assert torch.equal(model.transformer_blocks[0].attn.to_q.score, score)
    dense = FLUX.build("cpu", F32)
    accelerate.cpu_offload(dense, execution_device=torch.device("cpu"))
    rtlynx.apply(dense)
    assert not any(row.sparse for row in rtlynx.summary(dense))
    assert "its forward is wrapped" in caplog.text


def test_whole_model_offloading() -> None:
    model = sparse_flux()
    want = output(model, INPUTS)
    model, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(output(model, INPUTS), want)
    hook.offload()
    assert torch.equal(output(model, INPUTS), want)


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str, precision: str) -> None:
    model = sparse_flux(precision=precision)
    want = output(model, INPUTS)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(output(model, INPUTS), want)


@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_weights_stored_in_fp8(precision: str) -> None:
    model, inputs = sparse_flux(torch.bfloat16, precision=precision), FLUX.inputs("cpu", torch.bfloat16)
    want = output(model, inputs)
    layer = model.transformer_blocks[0].attn.to_q
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert isinstance(layer, SparseLinear) and layer.weight.dtype == torch.float8_e4m3fn
    got = output(model, inputs)
    assert got.dtype == torch.bfloat16 and 0 < relative_error(got, want) < 0.3
    assert layer.weight.dtype == torch.float8_e4m3fn


# ---- what runs beside the layers ---------------------------------------------------------------------------------------------------------


def test_attention_backends() -> None:
    model = sparse_flux()
    want = output(model, INPUTS)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(output(model, INPUTS), want, rtol=1e-3, atol=1e-3)


def test_controlnet() -> None:
    torch.manual_seed(0)
    keys = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    config = FLUX.build("cpu", F32).config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own
        controlnet = FluxControlNetModel(**{key: config[key] for key in (*keys, "pooled_projection_dim", "axes_dims_rope")}).eval()
    for block in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        nn.init.normal_(block.weight, std=0.05)  # zero in a new one
    condition = {**INPUTS, "controlnet_cond": torch.randn_like(INPUTS["hidden_states"])}

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            blocks, single = controlnet(**condition, return_dict=False)
        return output(model, {**INPUTS, "controlnet_block_samples": blocks, "controlnet_single_block_samples": single})

    model, dense = sparse_flux(), FLUX.build("cpu", F32)
    want, without = run(dense), output(dense, INPUTS)
    assert relative_error(without, want) > 1e-2
    assert 1e-3 < relative_error(run(model), want) < 0.8
    rtlynx.apply(controlnet)  # it is made of the same blocks
    rows = list(rtlynx.summary(controlnet))
    assert sum(row.sparse for row in rows) == FLUX.sparse_layers
    assert not any(row.sparse for row in rows if "controlnet" in row.name)
    assert 1e-3 < relative_error(run(model), want) < 0.8


def test_first_block_cache() -> None:
    model = sparse_flux()
    want = output(model, INPUTS)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.single_transformer_blocks[-1].attn.to_q.register_forward_hook(count)
    with model.cache_context("test"):
        first, second = output(model, INPUTS), output(model, INPUTS)
    assert torch.equal(first, want)
    assert calls == 1  # the same input again: only the first block runs
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
    model.disable_cache()
    assert torch.equal(output(model, INPUTS), want)


# ---- copies ------------------------------------------------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_compute_the_same_on_their_own(copied: Callable[[nn.Module], nn.Module], precision: str) -> None:
    model = sparse_flux(selection="weight", precision=precision)
    want = output(model, INPUTS)
    twin = copied(model)
    assert torch.equal(output(twin, INPUTS), want)
    layers = [m for m in twin.modules() if isinstance(m, SparseLinear)]
    assert {id(layer.input_group) for layer in layers}.isdisjoint(
        id(m.input_group) for m in model.modules() if isinstance(m, SparseLinear) and m.input_group
    )
    with torch.no_grad():
        layers[0].weight.zero_()
    assert torch.equal(output(model, INPUTS), want)
    rtlynx.remove(twin)
    assert not any(isinstance(m, SparseLinear) for m in twin.modules())


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, precision: Any) -> None:
    model = sparse_flux(precision=precision)
    state = model.state_dict()
    other = rtlynx.apply(FLUX.build("cpu", F32), SparsityConfig(rank=16, precision=precision))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not any(other.load_state_dict(state, assign=assign))
    assert torch.equal(output(other, INPUTS), output(model, INPUTS))


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_block(strict: bool, precision: str) -> None:
    model = sparse_flux(precision=precision).requires_grad_(False)
    block = model.transformer_blocks[0]
    seen: list[Any] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    output(model, INPUTS)
    handle.remove()
    args, kwargs = seen[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exported = torch.export.export(block, args, kwargs, strict=strict)
        want, got = block(*args, **kwargs), exported.module()(*args, **kwargs)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("sparse_linear" in name for name in names) == 12
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
