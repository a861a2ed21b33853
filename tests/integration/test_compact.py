"""`rtlynx.compact` on diffusers models: what still works on one, and what is refused before anything changes."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

import rtlynx
from rtlynx import InvalidArgumentError, RTLynxConfig, SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.reference import E4M3
from tiny_models import NEIGHBOURS, TINY, Tiny, output, relative_error
from tiny_pipelines import flux_lora, flux_pipeline, sample

FLUX = TINY["flux"]
F32, BF16 = torch.float32, torch.bfloat16
INPUTS = FLUX.inputs("cpu", F32)
# diffusers and peft warn of their own deprecations on these paths
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def fitted(model: Any, **options: Any) -> Any:
    """Sparse in fp8, every layer with a branch, those of one input with the same selection."""
    rtlynx.apply(model, SparsityConfig(rank=16, precision="fp8", **options))
    for layer in sparse_layers(getattr(model, "transformer", model)).values():
        k, n = layer.in_features, layer.out_features
        rng = torch.Generator().manual_seed(k)
        down, up, shift = (
            torch.randn(k, 16, generator=rng) / k**0.5,
            torch.randn(n, 16, generator=rng) / 9,
            torch.randn(k, generator=rng) / 9,
        )
        layer.set_compensation(down, up, shift, permutation=torch.randperm(k, generator=rng))
    return model


def compacted(dtype: torch.dtype = F32, **options: Any) -> Any:
    model = fitted(FLUX.build("cpu", dtype), **options)
    rtlynx.compact(model)
    return model


def held_bytes(module: nn.Module) -> int:
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}.values())


# ---- what it is --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [*TINY.values(), *NEIGHBOURS.values()], ids=[*TINY, *NEIGHBOURS])
def test_every_family_computes_the_same_in_less_memory(tiny: Tiny) -> None:
    model, inputs = fitted(tiny.build("cpu", BF16)), tiny.inputs("cpu", BF16)
    want, before, dtype = output(model, inputs), held_bytes(model), model.dtype
    rank_16 = {id(layer): layer.sharing for layer in sparse_layers(model).values()}
    freed = rtlynx.compact(model)
    assert torch.equal(output(model, inputs), want)
    assert held_bytes(model) == before - freed and model.dtype == dtype
    assert {id(layer): layer.sharing for layer in sparse_layers(model).values()} == rank_16
    rows = [row for row in rtlynx.summary(model) if row.sparse]
    assert len(rows) == tiny.sparse_layers and all(row.compact and "; compact" in row.remark for row in rows)
    assert rtlynx.compact(model) == 0


def test_dense_layers_of_it_are_close_to_those_it_had() -> None:
    model, dense = compacted(), FLUX.build("cpu", F32)
    for layer in sparse_layers(model).values():
        layer.dense = True
    assert 0 < relative_error(output(model, INPUTS), output(dense, INPUTS)) < 0.1
    assert all("; compact" in row.remark for row in rtlynx.summary(model) if row.compact)


def test_what_keeps_its_weight_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = fitted(FLUX.build("cpu", F32), dense_last=0.1)
    layer = model.transformer_blocks[0].attn.to_k
    layer.set_compensation(sparse_weight=torch.randn_like(layer.weight))
    assert not any(row.compact or row.not_compact for row in rtlynx.summary(model))
    rtlynx.compact(model)
    reason = "it computes densely too, and its sparse product has another weight"
    rows = {row.name: row for row in rtlynx.summary(model)}
    assert rows["transformer_blocks.0.attn.to_k"].not_compact == reason and rows["transformer_blocks.0.attn.to_q"].compact
    assert f"compact: not transformer_blocks.0.attn.to_k: {reason}" in caplog.text
    assert str(rtlynx.summary(model)).endswith(f", {FLUX.sparse_layers - 1} compact")


def test_the_layer_that_tells_the_models_dtype_keeps_its_weight() -> None:
    model, inputs = fitted(FLUX.build("cpu", BF16), include=("**",)), FLUX.inputs("cpu", BF16)
    first = next(name for name, _ in model.named_parameters()).removesuffix(".weight")
    want = output(model, inputs)
    rtlynx.compact(model)
    assert model.dtype == BF16 and torch.equal(output(model, inputs), want)
    rows = {row.name: row for row in rtlynx.summary(model)}
    assert rows[first].not_compact == "diffusers reads the model's dtype from its weight"
    assert sum(row.compact for row in rows.values()) == sum(row.sparse for row in rows.values()) - 1 > FLUX.sparse_layers


@pytest.mark.parametrize("mixed", [False, True])
def test_a_score_is_kept_shared_and_saved(mixed: bool) -> None:
    model, other = (fitted(FLUX.build("cpu", F32), selection="weight") for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand_like(parameter))
    rtlynx.refresh(other)
    if mixed:  # one of a group keeps its weight
        for each in (model, other):
            layer = each.transformer_blocks[0].attn.to_q
            layer.set_compensation(layer.comp_down, layer.comp_up, sparse_weight=torch.ones_like(layer.weight))
            layer.dense = True
    want = output(model, INPUTS)
    rtlynx.compact(model)
    assert torch.equal(output(model, INPUTS), want)
    rtlynx.compact(other)
    assert not any(other.load_state_dict(model.state_dict()))
    assert torch.equal(output(other, INPUTS), want)


# ---- where it goes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact_first", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(compact_first: bool, assign: bool) -> None:
    model, other = compacted(), rtlynx.apply(FLUX.build("cpu", F32), SparsityConfig(rank=16, precision="fp8"))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    if compact_first:
        rtlynx.compact(other)
        missing, unexpected = other.load_state_dict(model.state_dict(), strict=False, assign=assign)
        assert not missing and not unexpected
    else:
        assert not any(other.load_state_dict(model.state_dict(), assign=assign))
    assert all(layer.is_compact for layer in sparse_layers(other).values())
    assert torch.equal(output(other, INPUTS), output(model, INPUTS))


@pytest.mark.parametrize("from_config", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("selection", ["magnitude", "weight"])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype, selection: str, from_config: bool) -> None:
    inputs = FLUX.inputs("cpu", dtype)
    if from_config:
        FLUX.build("cpu", dtype).save_pretrained(tmp_path / "dense")
        config = RTLynxConfig(rank=16, precision="fp8", selection=selection)
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=config, torch_dtype=dtype)
        rtlynx.compact(model)
    else:
        model = compacted(dtype, selection=selection)
    model.transformer_blocks[0].attn.to_q.values_scale = 2.0
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["precision"] == "fp8"
    given = {} if dtype == F32 else {"torch_dtype": dtype}  # float32 is what models are without being told
    again, info = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", output_loading_info=True, **given)
    assert not any(info.values()) and again.dtype == dtype
    assert all(layer.is_compact and layer.compute_dtype == dtype and layer.weight.dtype == E4M3 for layer in sparse_layers(again).values())
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert str(rtlynx.summary(again)) == str(rtlynx.summary(model))
    again.save_pretrained(tmp_path / "again")
    twice = FluxTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
    assert torch.equal(output(twice, inputs), output(model, inputs))


def test_layers_fitted_jointly_give_up_both_weights(tmp_path: Path) -> None:
    model = rtlynx.apply(FLUX.build("cpu", F32), SparsityConfig(rank=16, precision="fp8"))
    rtlynx.calibrate(model, run=lambda: output(model, INPUTS), method="joint", rank=16, progress=False)
    want = output(model, INPUTS)
    freed = rtlynx.compact(model)
    layers = sparse_layers(model)
    numbers = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert freed > 7.9 * numbers and all(layer.compact_fitted is not None for layer in layers.values())
    assert torch.equal(output(model, INPUTS), want)
    with pytest.raises(InvalidArgumentError, match=r"dense steps or adaln_shift for the compact layer .* fitted for sparse products"):
        rtlynx.apply(model, SparsityConfig(rank=16, precision="fp8", dense_last=0.1))
    with pytest.raises(InvalidArgumentError, match=r"compact layer"):
        rtlynx.apply(model, SparsityConfig(rank=16, precision="fp8", adaln_shift=True))
    assert torch.equal(output(model, INPUTS), want)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(layer.compact_fitted is not None for layer in sparse_layers(again).values())
    assert torch.equal(output(again, INPUTS), want)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dense_last"] = 0.1
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match="dense steps or adaln_shift, for which"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"precision": "model"}, {"precision": "fp8", "skip": ("**.to_q",)}], ids=str)
def test_loading_it_as_something_else_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    compacted().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(options)
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match="that layer is compact there"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = compacted(selection="weight")
    want = output(model, INPUTS)
    twin = copied(model)
    assert torch.equal(output(twin, INPUTS), want)
    with torch.no_grad():
        next(iter(sparse_layers(twin).values())).weight.zero_()
    assert torch.equal(output(model, INPUTS), want) and not torch.equal(output(twin, INPUTS), want)


def test_a_cast_model_computes_in_its_new_dtype() -> None:
    model = compacted().to(BF16)
    assert all(layer.weight.dtype == E4M3 for layer in sparse_layers(model).values())
    got = output(model, FLUX.inputs("cpu", BF16))
    assert got.dtype == BF16 and relative_error(got, output(compacted(), INPUTS)) < 0.1


def whole(model: Any) -> None:
    accelerate.cpu_offload_with_hook(model, "cpu")


def sequential(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def sequential_but_for_buffers(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def group(kind: str) -> Callable[[Any], None]:
    return lambda model: model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [whole, sequential, sequential_but_for_buffers, group("leaf_level"), group("block_level")])
@pytest.mark.parametrize("values_scale", [1.0, 0.25])
def test_offloading(offload: Callable[[Any], None], values_scale: float) -> None:
    model = compacted(selection="weight")
    for layer in sparse_layers(model).values():
        layer.values_scale = values_scale
    want = output(model, INPUTS)
    offload(model)
    for _ in range(2):
        assert torch.equal(output(model, INPUTS), want)


@pytest.mark.parametrize(
    "offload, message", [(sequential, "offloaded weights"), (group("leaf_level"), "group"), (group("block_level"), "group")]
)
def test_after_offloading_it_is_too_late(offload: Callable[[Any], None], message: str) -> None:
    model = fitted(FLUX.build("cpu", F32))
    offload(model)
    with pytest.raises(InvalidArgumentError, match=message):
        rtlynx.compact(model)
    assert not any(layer.is_compact for layer in sparse_layers(model).values())


def test_layerwise_casting() -> None:
    model, late = compacted(BF16), fitted(FLUX.build("cpu", BF16))
    inputs = FLUX.inputs("cpu", BF16)
    want = output(model, inputs)
    for each in (model, late):
        each.enable_layerwise_casting(storage_dtype=E4M3, compute_dtype=BF16)
    weight = model.transformer_blocks[0].attn.to_q.weight
    got = output(model, inputs)
    assert got.dtype == BF16 and relative_error(got, want) < 0.3  # the branch is stored in fp8
    assert model.transformer_blocks[0].attn.to_q.weight is weight
    with pytest.raises(InvalidArgumentError, match="layerwise casting"):
        rtlynx.compact(late)


def test_compiled_blocks_serve_every_size() -> None:
    model = compacted()
    sizes = [FLUX.inputs("cpu", F32, side=side, text=text) for side, text in ((8, 19), (6, 7), (10, 30), (4, 12))]  # type: ignore[call-arg]
    want = [output(model, inputs) for inputs in sizes]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for i, inputs in enumerate(sizes):
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            torch.testing.assert_close(output(model, inputs), want[i], rtol=1e-4, atol=1e-4)


# ---- adapters ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unfused_adapters_from_a_file(dtype: torch.dtype) -> None:
    pipe, plain = (fitted(flux_pipeline("cpu", dtype)) for _ in range(2))
    rtlynx.compact(pipe)
    for each in (pipe, plain):
        each.load_lora_weights(flux_lora(1), adapter_name="style")
        each.load_lora_weights(flux_lora(2), adapter_name="subject")
        each.set_adapters(["style", "subject"], [1.0, 0.5])
    adapters = {name: tensor for name, tensor in pipe.transformer.named_parameters() if "lora_" in name}
    others = dict(plain.transformer.named_parameters())
    assert adapters and all(torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype for name, tensor in adapters.items())
    assert torch.equal(sample(pipe, output_type="latent"), sample(plain, output_type="latent"))
    pipe.unload_lora_weights()
    plain.unload_lora_weights()
    assert torch.equal(sample(pipe, output_type="latent"), sample(plain, output_type="latent"))


def delta(wrapper: Any) -> Tensor:
    return wrapper.get_delta_weight("style").detach()  # type: ignore[no-any-return]


def with_adapter(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="style")
    return model


def test_a_new_adapter_has_the_models_dtype_and_trains() -> None:
    model = with_adapter(compacted(BF16), ["to_q", "proj_mlp"])
    wrapper = model.transformer_blocks[0].attn.to_q
    assert (
        wrapper.lora_A["style"].weight.dtype
        == with_adapter(fitted(FLUX.build("cpu", BF16)), ["to_q"]).transformer_blocks[0].attn.to_q.lora_A["style"].weight.dtype
    )
    x = torch.randn(5, 128, dtype=BF16)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), wrapper.base_layer(x) + x @ delta(wrapper).to(BF16).T, rtol=2e-2, atol=2e-2)


def test_fusing_is_refused_before_anything_changes() -> None:
    model = with_adapter(compacted(), ["to_q", "time_text_embed.timestep_embedder.linear_1"])
    want = output(model, INPUTS)
    with pytest.raises(InvalidArgumentError, match=r"fuse_lora: .* 3 compact layers \(first transformer_blocks.0.attn.to_q\)"):
        model.fuse_lora()
    assert torch.equal(output(model, INPUTS), want)
    # past diffusers, torch refuses: it adds nothing to float8
    with pytest.raises(RuntimeError, match="Float8"):
        model.transformer_blocks[0].attn.to_q.merge()
    assert torch.equal(output(model, INPUTS), want)


def test_adapters_of_other_layers_fuse() -> None:
    model = with_adapter(compacted(), ["timestep_embedder.linear_1"])
    want = output(model, INPUTS)
    model.fuse_lora()
    torch.testing.assert_close(output(model, INPUTS), want, rtol=1e-3, atol=1e-3)
    model.unfuse_lora()


def test_what_was_fused_before_stays_and_cannot_be_taken_out() -> None:
    model = with_adapter(fitted(FLUX.build("cpu", F32)), ["to_q"])
    model.fuse_lora()
    want = output(model, INPUTS)
    rtlynx.compact(model)
    assert torch.equal(output(model, INPUTS), want)
    with pytest.raises(InvalidArgumentError, match="unfuse_lora"):
        model.unfuse_lora()
    model.unload_lora()
    assert torch.equal(output(model, INPUTS), want)


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, op",
    [
        (rtlynx.remove, "remove"),
        (rtlynx.refresh, "refresh"),
        (lambda model: rtlynx.apply(model), "apply"),
        (lambda model: rtlynx.calibrate(model, run=lambda: output(model, INPUTS), progress=False), "calibrate"),
        (lambda model: rtlynx.search(model, budget=0.9, run=lambda: output(model, INPUTS), progress=False), "search"),
        (lambda model: rtlynx.evaluate(model, ["a"]), "evaluate"),
        (lambda model: model.fuse_qkv_projections(), "fuse_projections"),
    ],
)
def test_what_needs_the_weights(act: Callable[[Any], object], op: str) -> None:
    model = compacted()
    want = output(model, INPUTS)
    with pytest.raises(InvalidArgumentError, match=f"^{op}: "):
        act(model)
    assert torch.equal(output(model, INPUTS), want)


def test_compensation_files_are_loaded_and_saved_before(tmp_path: Path) -> None:
    model = fitted(FLUX.build("cpu", F32))
    rtlynx.save_compensation(model, tmp_path / "c.safetensors")
    want = output(model, INPUTS)
    other = rtlynx.apply(FLUX.build("cpu", F32), SparsityConfig(rank=16, precision="fp8"))
    rtlynx.load_compensation(other, tmp_path / "c.safetensors")
    rtlynx.compact(other)
    assert torch.equal(output(other, INPUTS), want)
    with pytest.raises(InvalidArgumentError, match="load it before"):
        rtlynx.load_compensation(other, tmp_path / "c.safetensors")
    with pytest.raises(InvalidArgumentError, match="save it before"):
        rtlynx.save_compensation(other, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists() and torch.equal(output(other, INPUTS), want)


def test_two_transformers_and_pipelines() -> None:
    pipe = flux_pipeline()
    pipe.transformer_2 = FLUX.build("cpu", F32)
    fitted(pipe)
    freed = rtlynx.compact(pipe)
    assert all(layer.is_compact for part in (pipe.transformer, pipe.transformer_2) for layer in sparse_layers(part).values())
    assert freed > 0 == rtlynx.compact(pipe)
