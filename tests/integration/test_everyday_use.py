"""What users do with a model, on one with sparse layers: batches, offloading, casting, caches, copies, export."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from sparse_models import MODELS, sparse
from tiny_models import TINY, output, relative_error
from tiny_pipelines import flux_controlnet

F32 = torch.float32
FLUX = TINY["flux"]
INPUTS = {name: tiny.inputs("cpu", F32) for name, tiny in MODELS.items()}
families = pytest.mark.parametrize("family", MODELS)
# What fp8 adds is in the layers, which are the same in every model: one will do.
families_and_fp8 = pytest.mark.parametrize(("family", "precision"), [*((name, "model") for name in MODELS), ("flux", "fp8")])


def last_sparse(model: nn.Module) -> SparseLinear:
    """In a block: in embedders, which HunyuanVideo's first are in, diffusers leaves some things as they are."""
    return [m for m in model.modules() if isinstance(m, SparseLinear)][-1]


# ---- shapes ------------------------------------------------------------------------------------------------------------------------------


@families
def test_samples_of_a_batch_do_not_see_each_other(family: str) -> None:
    # as with classifier-free guidance, in one batch or in two forwards
    model, inputs = rtlynx.apply(MODELS[family].build("cpu", F32)), INPUTS[family]
    both = output(model, inputs)

    def sample(i: int) -> dict[str, Any]:
        return {
            **inputs,
            **{key: value[i : i + 1] for key, value in inputs.items() if isinstance(value, (Tensor, list)) and len(value) == 2},
        }

    for i in range(2):
        torch.testing.assert_close(output(model, sample(i))[0], both[i], rtol=1e-3, atol=1e-3)


def test_images_and_prompts_of_different_sizes() -> None:
    model, dense = sparse("flux"), FLUX.build("cpu", F32)
    for side, text in ((8, 19), (4, 3), (12, 64), (8, 1)):
        inputs = FLUX.inputs("cpu", F32, side=side, text=text)  # type: ignore[call-arg]
        got, want = output(model, inputs), output(dense, inputs)
        assert got.shape == want.shape and relative_error(got, want) < 0.8


# ---- where weights are -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config"), [*((name, {}) for name in MODELS), ("flux", {"selection": "weight"}), ("flux", {"precision": "fp8"})], ids=str
)
def test_sequential_offloading(family: str, config: dict[str, Any]) -> None:
    model = sparse(family, **config)
    want = output(model, INPUTS[family])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert last_sparse(model).weight.is_meta
    for _ in range(2):
        assert torch.equal(output(model, INPUTS[family]), want)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(output(model, INPUTS[family]), want)


def test_after_offloading_it_is_too_late(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse("flux", selection="weight")
    score = model.transformer_blocks[0].attn.to_q.score.clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(rtlynx.InvalidArgumentError, match=r"remove: .* hook .*offloading"):
        rtlynx.remove(model)
    rtlynx.refresh(model)
    assert f"weights of {FLUX.sparse_layers} layers are offloaded" in caplog.text
    assert torch.equal(model.transformer_blocks[0].attn.to_q.score, score)
    dense = FLUX.build("cpu", F32)
    accelerate.cpu_offload(dense, execution_device=torch.device("cpu"))
    rtlynx.apply(dense)
    assert not any(row.sparse for row in rtlynx.summary(dense))
    assert "its forward is wrapped" in caplog.text


@families
def test_whole_model_offloading(family: str) -> None:
    model = sparse(family)
    want = output(model, INPUTS[family])
    model, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(output(model, INPUTS[family]), want)
    hook.offload()
    assert torch.equal(output(model, INPUTS[family]), want)


@families_and_fp8
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str, family: str, precision: str) -> None:
    model = sparse(family, precision=precision)
    want = output(model, INPUTS[family])
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(output(model, INPUTS[family]), want)


@families_and_fp8
def test_weights_stored_in_fp8(family: str, precision: str) -> None:
    model, inputs = sparse(family, torch.bfloat16, precision=precision), MODELS[family].inputs("cpu", torch.bfloat16)
    want = output(model, inputs)
    layer = last_sparse(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.comp_down.dtype == layer.comp_up.dtype == torch.bfloat16
    got = output(model, inputs)
    assert got.dtype == torch.bfloat16 and 0 < relative_error(got, want) < 0.3
    assert layer.weight.dtype == torch.float8_e4m3fn


PREPARES = pytest.mark.parametrize("config", [{}, {"selection": "weight"}, {"precision": "fp8"}], ids=str)
"""What layers make from their weights ahead: nothing, scores, copies."""


def stored(model: Any) -> Any:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model


@PREPARES
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_replaces_weights_stored_in_fp8(assign: bool, config: dict[str, Any]) -> None:
    def build() -> Any:
        model = sparse("flux", torch.bfloat16, fuse=False, **config)
        layer = last_sparse(model)
        layer.set_compensation(shift=torch.ones(layer.in_features), permutation=torch.arange(layer.in_features).flip(0))
        return model

    inputs = FLUX.inputs("cpu", torch.bfloat16)
    model, twin = stored(build()), build()
    before = output(model, inputs)
    model.load_state_dict({name: tensor.flip(-1).contiguous() for name, tensor in twin.state_dict().items()}, assign=assign)
    got = output(model, inputs)
    twin.load_state_dict({name: tensor.to(twin.state_dict()[name].dtype) for name, tensor in model.state_dict().items()})
    # Assigned weights are rounded to 8 bits after their first call, and what is prepared from them was prepared before.
    assert relative_error(got, output(twin, inputs)) <= (0.1 if assign else 0)
    assert relative_error(got, before) > 0.5


@PREPARES
def test_after_weights_are_stored_in_fp8_it_is_too_late(config: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = sparse("flux", torch.bfloat16, **config), FLUX.inputs("cpu", torch.bfloat16)
    rtlynx.save_compensation(model, tmp_path / "c.safetensors")
    want = output(stored(model), inputs)
    for call in (rtlynx.refresh, lambda model: rtlynx.load_compensation(model, tmp_path / "c.safetensors")):
        with pytest.raises(rtlynx.InvalidArgumentError, match="call it before enable_layerwise_casting") as refused:
            call(model)
        assert refused.value.op in ("refresh", "Compensation") and "float8_e4m3fn" in refused.value.got
    for op, call in (("remove", rtlynx.remove), ("apply", rtlynx.apply)):
        with pytest.raises(rtlynx.InvalidArgumentError, match=r"wrapped by a hook .*layerwise casting") as refused:
            call(model)
        assert (refused.value.op, refused.value.argument) == (op, "pipe_or_module")
    assert torch.equal(output(model, inputs), want)


def test_a_compensation_of_weights_stored_in_fp8_fits_them(tmp_path: Path) -> None:
    model, inputs = stored(sparse("flux", torch.bfloat16)), FLUX.inputs("cpu", torch.bfloat16)
    rtlynx.save_compensation(model, tmp_path / "c.safetensors")
    want = output(model, inputs)
    last_sparse(model).set_compensation()
    rtlynx.load_compensation(model, tmp_path / "c.safetensors")
    assert torch.equal(output(model, inputs), want)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own, of RMS norms
@families
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half: torch.dtype, family: str) -> None:
    model, dense = sparse(family), MODELS[family].build("cpu", F32)
    want = output(model, INPUTS[family])
    with torch.autocast("cpu", half):
        got, like = output(model, INPUTS[family]), output(dense, INPUTS[family])
    assert got.dtype == like.dtype and 0 < relative_error(got, want) < 0.2
    assert torch.equal(output(model, INPUTS[family]), want)


# ---- what runs beside the layers ---------------------------------------------------------------------------------------------------------


@families
def test_attention_backends(family: str) -> None:
    model = sparse(family)
    want = output(model, INPUTS[family])
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(output(model, INPUTS[family]), want, rtol=1e-3, atol=1e-3)


def test_controlnet() -> None:
    controlnet, inputs = flux_controlnet(), INPUTS["flux"]
    torch.manual_seed(0)
    condition = {**inputs, "controlnet_cond": torch.randn_like(inputs["hidden_states"])}

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            blocks, single = controlnet(**condition, return_dict=False)
        return output(model, {**inputs, "controlnet_block_samples": blocks, "controlnet_single_block_samples": single})

    model, dense = sparse("flux"), FLUX.build("cpu", F32)
    want, without = run(dense), output(dense, inputs)
    assert relative_error(without, want) > 1e-2
    assert 1e-3 < relative_error(run(model), want) < 0.8
    rtlynx.apply(controlnet)  # it is made of the same blocks
    rows = list(rtlynx.summary(controlnet))
    assert sum(row.sparse for row in rows) == FLUX.sparse_layers
    assert not any(row.sparse for row in rows if "controlnet" in row.name)
    assert 1e-3 < relative_error(run(model), want) < 0.8


# ---- copies ------------------------------------------------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@families_and_fp8
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_compute_the_same_on_their_own(copied: Callable[[nn.Module], nn.Module], family: str, precision: str) -> None:
    model = sparse(family, selection="weight", precision=precision)
    want = output(model, INPUTS[family])
    twin = copied(model)
    assert torch.equal(output(twin, INPUTS[family]), want)
    layers = [m for m in twin.modules() if isinstance(m, SparseLinear)]
    assert {id(layer.input_group) for layer in layers}.isdisjoint(
        id(m.input_group) for m in model.modules() if isinstance(m, SparseLinear) and m.input_group
    )
    with torch.no_grad():
        layers[0].weight.zero_()
    assert torch.equal(output(model, INPUTS[family]), want)
    rtlynx.remove(twin)
    assert not any(isinstance(m, SparseLinear) for m in twin.modules())


@families_and_fp8
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, family: str, precision: Any) -> None:
    model = sparse(family, precision=precision)
    state = model.state_dict()
    other = rtlynx.apply(MODELS[family].build("cpu", F32), SparsityConfig(rank=16, precision=precision))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not any(other.load_state_dict(state, assign=assign))
    assert torch.equal(output(other, INPUTS[family]), output(model, INPUTS[family]))


# strict is dynamo's way, which compiling takes in every family
@pytest.mark.parametrize(
    ("family", "precision", "strict"),
    [*((name, "model", False) for name in MODELS), ("flux", "model", True), ("flux", "fp8", False), ("flux", "fp8", True)],
)
def test_export_of_the_first_blocks(family: str, precision: str, strict: bool) -> None:
    model = sparse(family, precision=precision).requires_grad_(False)
    names = {name for name, _ in model.named_modules()}
    for name in names & {"transformer_blocks.0", "single_transformer_blocks.0", "blocks.0", "layers.0"}:
        block, seen = model.get_submodule(name), []
        handle = block.register_forward_pre_hook(lambda _, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True)
        output(model, INPUTS[family])
        handle.remove()
        args, kwargs = seen[0]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            exported = torch.export.export(block, args, kwargs, strict=strict)
            want, got = block(*args, **kwargs), exported.module()(*args, **kwargs)
        calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert sum("sparse_linear" in call for call in calls) == sum(isinstance(m, SparseLinear) for m in block.modules())
        torch.testing.assert_close(got, want)
