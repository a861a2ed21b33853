"""apply → forward → remove on small models of the three target families, from diffusers' own classes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import rtlynx
from rtlynx import SparsityConfig
from tiny_models import SPARSE_LAYERS, TINY, Tiny, output, relative_error

families = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(family: str, dtype: torch.dtype) -> None:
    tiny = TINY[family]
    model, inputs = tiny.build("cpu", dtype), tiny.inputs("cpu", dtype)
    want = output(model, inputs)
    keys = list(model.state_dict())
    rtlynx.apply(model)
    summary = rtlynx.summary(model)
    assert {row.name for row in summary if row.sparse} == SPARSE_LAYERS[family]
    assert all(row.kernel == "reference (CPU)" for row in summary if row.sparse)
    assert list(model.state_dict()) == keys
    got = output(model, inputs)
    assert got.dtype == dtype and got.isfinite().all()
    assert 1e-3 < relative_error(got, want) < 0.5
    assert torch.equal(output(rtlynx.remove(model), inputs), want)


@families
def test_dense_switch_everywhere_is_the_dense_model(tiny: Tiny) -> None:
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    want = output(model, inputs)
    for module in rtlynx.apply(model).modules():
        if isinstance(module, rtlynx.SparseLinear):
            module.dense = True
    assert torch.equal(output(model, inputs), want)


@families
def test_weight_informed_selection_is_closer_here(tiny: Tiny) -> None:
    # Random weights have columns of nearly equal norm, so scale some: then the magnitude of x_j alone misleads.
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in _eligible(model):
            layer.weight *= torch.rand(layer.in_features, generator=rng) * 2
    want = output(model, inputs)
    magnitude, weight = (
        relative_error(output(rtlynx.apply(model, SparsityConfig(selection=s)), inputs), want)  # type: ignore[arg-type]
        for s in ("magnitude", "weight")
    )
    assert weight < magnitude


def _eligible(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    from rtlynx.eligibility import candidates

    return [(c.name, c.module) for c in candidates(model, SparsityConfig()) if c.reason is None]


def test_save_pretrained_of_an_applied_model_loads_as_a_dense_one(tmp_path: Path) -> None:
    tiny = TINY["flux"]
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    want = output(model, inputs)
    rtlynx.apply(model).save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path).eval(), inputs), want)


def test_fused_projections_are_served_when_fused_first() -> None:
    tiny = TINY["flux"]
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    want = output(model, inputs)
    with torch.no_grad():
        model.fuse_qkv_projections()
    rows = {row.name for row in rtlynx.summary(rtlynx.apply(model)) if row.sparse}
    assert {"transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.attn.to_added_qkv"} <= rows
    assert 1e-3 < relative_error(output(model, inputs), want) < 0.5


def test_deepcopy_of_an_applied_model_computes_the_same() -> None:
    tiny = TINY["flux"]
    model, inputs = rtlynx.apply(tiny.build("cpu", torch.float32)), tiny.inputs("cpu", torch.float32)
    assert torch.equal(output(copy.deepcopy(model), inputs), output(model, inputs))
