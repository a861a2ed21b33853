"""Adapters on sparse layers, and sparse layers under adapters that are there already."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from sparse_models import MODELS, sparse
from tiny_models import TINY, output, relative_error

TARGETS = ["to_q", "to_k", "proj_mlp", "ff.net.0.proj"]


def flux() -> tuple[Any, dict[str, Any]]:
    return TINY["flux"].build("cpu", torch.float32), TINY["flux"].inputs("cpu", torch.float32)


def add_lora(model: Any, name: str = "style") -> None:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), adapter_name=name)


def delta(layer: nn.Module, name: str = "style") -> Tensor:
    return layer.get_delta_weight(name).detach()  # type: ignore[operator, no-any-return]


def test_an_adapter_on_a_sparse_model() -> None:
    model, inputs = flux()
    rtlynx.apply(model)
    sparse_only = output(model, inputs)
    add_lora(model)
    to_q = model.transformer_blocks[0].attn.to_q
    assert isinstance(to_q.base_layer, SparseLinear)

    # unfused: the sparse layer plus a dense low-rank product
    x = torch.randn(5, 128)
    with torch.no_grad():
        torch.testing.assert_close(to_q(x), to_q.base_layer(x) + x @ delta(to_q).T, rtol=1e-4, atol=1e-4)
    with_adapter = output(model, inputs)
    assert relative_error(with_adapter, sparse_only) > 1e-3

    # fused: the sparse layer of the changed weight
    weight = to_q.base_layer.weight.detach().clone()
    model.fuse_lora()
    fused = to_q.base_layer.weight.detach()
    torch.testing.assert_close(fused, weight + delta(to_q), rtol=1e-5, atol=1e-6)
    assert relative_error(output(model, inputs), with_adapter) < 0.5
    model.unfuse_lora()
    assert relative_error(output(model, inputs), with_adapter) < 1e-3  # the weight comes back up to rounding

    # the compensation is not an adapter: removing adapters leaves the layers sparse
    model.unload_lora()
    assert isinstance(model.transformer_blocks[0].attn.to_q, SparseLinear)
    assert relative_error(output(model, inputs), sparse_only) < 1e-3


def test_applying_to_a_model_with_an_adapter_and_removing_again() -> None:
    model, inputs = flux()
    add_lora(model)
    want = output(model, inputs)
    config = SparsityConfig(rank=16)
    rtlynx.apply(model, config)
    to_q = model.transformer_blocks[0].attn.to_q
    assert type(to_q).__module__.startswith("peft") and isinstance(to_q.base_layer, SparseLinear)
    rows = {row.name: row for row in rtlynx.summary(model)}
    assert rows["transformer_blocks.0.attn.to_q"].sparse
    assert rows["transformer_blocks.0.attn.to_q.lora_A.style"].reason == "part of a peft adapter"
    assert sum(row.sparse for row in rows.values()) == TINY["flux"].sparse_layers
    assert relative_error(output(model, inputs), want) > 1e-3
    rtlynx.remove(model)
    assert torch.equal(output(model, inputs), want)


def test_patterns_never_reach_into_an_adapter() -> None:
    model, _ = flux()
    add_lora(model)
    rtlynx.apply(model, SparsityConfig(include=("**",)))
    assert not any(isinstance(m, SparseLinear) for name, m in model.named_modules() if "lora_" in name)


def test_compensation_files_do_not_mind_adapters(tmp_path: Any) -> None:
    plain, inputs = flux()
    rtlynx.apply(plain, SparsityConfig(rank=16))
    rtlynx.calibrate(plain, run=lambda: output(plain, inputs), progress=False)
    rtlynx.save_compensation(plain, tmp_path / "c.safetensors")
    wrapped, _ = flux()
    add_lora(wrapped)
    rtlynx.load_compensation(wrapped, tmp_path / "c.safetensors")
    assert wrapped.transformer_blocks[0].attn.to_q.base_layer.rank == 16
    wrapped.disable_adapters()
    torch.testing.assert_close(output(wrapped, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)
    wrapped.enable_adapters()
    wrapped.fuse_lora()
    with pytest.raises(rtlynx.CompensationMismatchError, match="fused LoRA"):
        rtlynx.load_compensation(wrapped, tmp_path / "c.safetensors")


# ---- what was prepared from a weight follows it -----------------------------------------------------------------------------------------


def prepared(layer: SparseLinear, rank: int = 0) -> None:
    rng = torch.Generator().manual_seed(5)
    k, n = layer.in_features, layer.out_features
    branch = (torch.randn(k, rank, generator=rng) / 9, torch.randn(n, rank, generator=rng)) if rank else (None, None)
    layer.set_compensation(*branch, torch.randn(k, generator=rng), permutation=torch.randperm(k, generator=rng))


def test_prepared_weights_follow_a_fused_adapter(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = flux()
    config = SparsityConfig(selection="weight", precision="fp8")
    rtlynx.apply(model, config)
    add_lora(model)
    to_q = model.transformer_blocks[0].attn.to_q
    layer = to_q.base_layer
    prepared(layer)
    own = torch.randn(128)
    layer.comp_bias.data += own  # as calibration with bias=True adds
    state = layer.state_dict()
    layer.load_state_dict(state)
    before = {
        name: layer.get_buffer(name).clone() if name == "score" else layer.get_parameter(name).clone() for name in ("score", "comp_bias")
    }
    with caplog.at_level("WARNING", "rtlynx"):
        model.fuse_lora()
        want = SparseLinear.from_linear(torch.nn.Linear(128, 128), config)
        want.weight, want.bias = layer.weight, layer.bias
        want.set_compensation(shift=layer.shift, permutation=layer.permutation)
        assert torch.equal(layer.sparse_weight, want.sparse_weight)
        assert torch.equal(layer.weight_fp8.float(), want.weight_fp8.float()) and torch.equal(layer.weight_scale, want.weight_scale)
        torch.testing.assert_close(layer.comp_bias, want.comp_bias + own)
        group = [to_q, model.transformer_blocks[0].attn.to_k, model.transformer_blocks[0].attn.to_v]
        norms = torch.cat([getattr(m, "base_layer", m).weight for m in group]).norm(dim=0)
        torch.testing.assert_close(layer.score, norms[layer.permutation].detach())
        assert not torch.allclose(layer.score, before["score"])
        model.unfuse_lora()
    torch.testing.assert_close(layer.score, before["score"])
    torch.testing.assert_close(layer.comp_bias, before["comp_bias"])
    torch.testing.assert_close(layer.sparse_weight, layer.weight[:, layer.permutation], rtol=0, atol=0)
    assert "refresh" not in caplog.text  # nothing here was fitted


def test_a_fused_adapter_warns_of_a_branch_fitted_without_it(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = flux()
    rtlynx.apply(model, SparsityConfig(rank=16))
    rtlynx.calibrate(model, run=lambda: output(model, inputs), progress=False)
    add_lora(model)
    with caplog.at_level("WARNING", "rtlynx"):
        model.fuse_lora()
    touched = 1 * 2 + 1 + 2 * 3  # to_q, to_k and the MLP of the double-stream block, three in each single-stream block
    assert f"the compensation of {touched} layers was fitted to other weights (first transformer_blocks.0.attn.to_q)" in caplog.text
    caplog.clear()
    model.unfuse_lora()
    assert "refresh" not in caplog.text
    model.unload_lora()
    rtlynx.calibrate(model, run=lambda: output(model, inputs), progress=False)
    assert rtlynx.refresh(model) is model
    assert "refresh" not in caplog.text


def test_refresh_after_a_change_nobody_announced(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = flux()
    rtlynx.apply(model)
    layer = model.transformer_blocks[0].attn.to_q
    prepared(layer, rank=16)
    stale = layer.sparse_weight.clone()
    layer.weight.data = layer.weight.data * 1.5
    rtlynx.refresh(model)
    assert "of 1 layers was fitted to other weights" in caplog.text
    assert torch.equal(layer.sparse_weight, layer.weight[:, layer.permutation])
    assert not torch.equal(layer.sparse_weight, stale)


def test_adapters_fuse_into_dense_models_as_ever() -> None:
    rtlynx.apply(flux()[0])  # its class refreshes from now on
    model, inputs = flux()
    add_lora(model)
    want = output(model, inputs)
    model.fuse_lora()
    torch.testing.assert_close(output(model, inputs), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(set(MODELS) - {"pixart"}))  # whose class has no `add_adapter` in diffusers
def test_several_adapters_and_their_weights(family: str) -> None:
    model, inputs = sparse(family), MODELS[family].inputs("cpu", torch.float32)
    alone = output(model, inputs)
    for name in ("one", "two"):
        add_lora(model, name)
    outputs = {}
    for names, weights in ((["one"], None), (["one", "two"], [0.5, 2.0]), (["one", "two"], [0.0, 0.0])):
        model.set_adapters(names, weights)
        outputs[str(weights)] = output(model, inputs)
    assert relative_error(outputs["None"], alone) > 1e-3
    assert relative_error(outputs["[0.5, 2.0]"], outputs["None"]) > 1e-3
    torch.testing.assert_close(outputs["[0.0, 0.0]"], alone)
    model.set_adapters(["one", "two"], [0.5, 2.0])
    model.fuse_lora()
    assert 0 < relative_error(output(model, inputs), outputs["[0.5, 2.0]"]) < 0.5  # the branch, of other weights, is as it was
    model.unfuse_lora()
    torch.testing.assert_close(output(model, inputs), outputs["[0.5, 2.0]"], rtol=1e-3, atol=1e-3)
    model.delete_adapters(["one", "two"])
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == MODELS[family].sparse_layers
