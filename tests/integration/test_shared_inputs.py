"""Diffusers' own models select once for each input their recipe says is shared, and fused projections stay sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rtlynx
from permutations import free, in_windows
from rtlynx import SparseLinear, SparsityConfig
from tiny_models import NEIGHBOURS, TINY, Tiny, output, relative_error

ALL = {**TINY, **NEIGHBOURS}
families = pytest.mark.parametrize("family", ALL)

SELECTIONS = {
    "flux": (1 * 2 * (1 + 1 + 1 + 1)) + 2 * (1 + 1),  # two streams of qkv, out, up, down; then everything but proj_out at once
    "qwen_image": 2 * 2 * 4,
    "z_image": 4 * (1 + 1 + 1 + 1),  # qkv, out, w1 and w3, w2
    "flux2": 2 * 4 + 2 * 2,
    "sd3": 3 * 2 * 4 + 2 - 3,  # the second attention of the first block: qkv and out; no text output of the last block
    "pixart": 2 * (2 + 3 + 2),  # cross-attention: q, kv, out
    "wan": 2 * (2 + 4 + 2),  # and the image's kv
    "hunyuan_video": 2 * 4 + 2 * 3 + 4,  # proj_mlp reads a copy
    "ltx": 2 * (2 + 3 + 2),
}
"""Family → how often its small model selects."""


def build(tiny: Tiny, config: SparsityConfig | None = None, order: Callable[[int], Tensor] | None = None) -> tuple[Any, dict[str, Any]]:
    """With a branch in every layer, one `comp_down` for all of the same width, and one permutation if `order` gives any."""
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    rtlynx.apply(model, config or SparsityConfig(rank=16))
    rng = torch.Generator().manual_seed(0)
    downs: dict[int, Tensor] = {}
    for layer in layers(model):
        down = downs.setdefault(layer.in_features, torch.randn(layer.in_features, 16, generator=rng) / 30)
        permutation = None if order is None else order(layer.in_features)
        layer.set_compensation(down, torch.randn(layer.out_features, 16, generator=rng) / 30, permutation=permutation)
    return model, inputs


def layers(root: nn.Module) -> list[SparseLinear]:
    return [module for module in root.modules() if isinstance(module, SparseLinear)]


@families
def test_selections_of_a_forward(family: str, selections: list[Tensor]) -> None:
    model, inputs = build(ALL[family])
    shared = output(model, inputs)
    assert len(selections) == SELECTIONS[family]
    assert all(layer.input_group is None or layer.input_group._kept is None for layer in layers(model))
    for layer in layers(model):
        layer.input_group = None
    assert torch.equal(output(model, inputs), shared)
    assert len(selections) == SELECTIONS[family] + ALL[family].sparse_layers


@pytest.mark.parametrize("family", ["flux", "flux2", "pixart", "wan"])  # those that diffusers can fuse
@pytest.mark.parametrize("options", [{}, {"selection": "weight"}, {"precision": "fp8"}], ids=str)
@pytest.mark.parametrize("order", [None, free, in_windows], ids=["plain", "free", "windows"])
def test_fused_projections_stay_sparse(
    family: str, options: dict[str, Any], order: Callable[[int], Tensor] | None, selections: list[Tensor]
) -> None:
    model, inputs = build(ALL[family], SparsityConfig(rank=16, **options), order)
    want = output(model, inputs)
    before = len(selections)
    model.fuse_qkv_projections()
    fused = [name for name, module in model.named_modules() if name.rpartition(".")[2].startswith(("to_qkv", "to_kv", "to_added"))]
    assert fused and all(isinstance(model.get_submodule(name), SparseLinear) for name in fused)
    assert relative_error(output(model, inputs), want) < 1e-5
    assert len(selections) - before <= SELECTIONS[family]
    rtlynx.apply(model, SparsityConfig(rank=16, **options))
    assert relative_error(output(model, inputs), want) < 1e-5
    model.unfuse_qkv_projections()
    before = len(selections)
    assert torch.equal(output(model, inputs), want)
    assert len(selections) - before == SELECTIONS[family]


def test_fusing_a_dense_model_gives_dense_layers() -> None:
    rtlynx.apply(TINY["flux"].build("cpu", torch.float32))  # its classes know of rtlynx now
    model: Any = TINY["flux"].build("cpu", torch.float32)
    model.fuse_qkv_projections()
    assert type(model.transformer_blocks[0].attn.to_qkv) is nn.Linear


def test_branches_of_their_own_are_fused_side_by_side_or_not_at_all(caplog: pytest.LogCaptureFixture) -> None:
    rng = torch.Generator().manual_seed(0)
    for rank, fits in ((32, True), (48, False)):
        model, inputs = build(TINY["flux"], SparsityConfig(rank=rank))
        for layer in layers(model):
            down, up = (torch.randn(n, rank, generator=rng) / 30 for n in (layer.in_features, layer.out_features))
            layer.set_compensation(down, up, torch.ones(layer.in_features) / 10)
        want = output(model, inputs)
        model.fuse_qkv_projections()
        fused = model.single_transformer_blocks[0].attn.to_qkv
        assert isinstance(fused, SparseLinear) is fits
        if fits:
            assert fused.rank == 3 * rank
            assert relative_error(output(model, inputs), want) < 1e-5
        else:
            assert "rank 144" in caplog.text


@pytest.mark.parametrize("leaves", ["leaf_level", "block_level"])
def test_layers_that_are_moved_ahead_share_nothing(leaves: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    offloaded = []
    monkeypatch.setattr("diffusers.hooks.apply_group_offloading", lambda module, **given: offloaded.append(given["use_stream"]))
    model, inputs = build(TINY["flux"])
    want = output(model, inputs)
    to_q, to_k = model.transformer_blocks[0].attn.to_q, model.transformer_blocks[0].attn.to_k
    for use_stream in (False, True):
        assert to_q.comp_down is to_k.comp_down and to_q.sharing == 3
        with caplog.at_level("WARNING", "rtlynx"):
            model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), leaves, num_blocks_per_group=1, use_stream=use_stream)
    assert offloaded == [False, True]
    moved_ahead = leaves == "leaf_level"
    assert (to_q.comp_down is not to_k.comp_down) is moved_ahead
    assert (to_q.input_group is None) is moved_ahead
    assert ("select for themselves from now on" in caplog.text) is moved_ahead
    assert len({id(layer.comp_down) for layer in layers(model)}) == len(layers(model)) or not moved_ahead
    assert torch.equal(output(model, inputs), want)
