"""Whole models on the kernels: all families and their round trips, three calibrated, one compiled, against the layers on the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import rtlynx
from rtlynx import ops, reference
from sparse_models import MODELS
from tiny_models import SPARSE_LAYERS, TINY, output, relative_error

FAMILIES = sorted(MODELS)
DTYPES = [torch.bfloat16, torch.float16]
ALWAYS = rtlynx.SparsityConfig(small_m="sparse")  # layers as small as these are faster dense


@contextmanager
def on_the_reference() -> Iterator[None]:
    """Let the ops of CUDA tensors run reference.py instead of the kernels."""
    kernels = ops.sparsify, ops.sparse_linear
    ops.sparsify, ops.sparse_linear = reference.sparsify, reference.sparse_linear
    try:
        yield
    finally:
        ops.sparsify, ops.sparse_linear = kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_the_reference_computes(family: str, dtype: torch.dtype) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build("cuda", dtype), tiny.inputs("cuda", dtype)
    rtlynx.apply(model, ALWAYS)
    got = output(model, inputs)
    with on_the_reference():
        want = output(model, inputs)
    assert got.isfinite().all()
    # A rounding may flip a near-tie of a later layer's selection, so this is a norm over the model, not a bound per element.
    assert relative_error(got, want) < 3e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_forward_remove_round_trip(family: str) -> None:
    tiny = MODELS[family]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    dense = output(model, inputs)
    rtlynx.apply(model, ALWAYS)
    rows = [row for row in rtlynx.summary(model, tokens=512) if row.sparse]
    assert len(rows) == tiny.sparse_layers
    assert family not in SPARSE_LAYERS or {row.name for row in rows} == SPARSE_LAYERS[family]
    assert all(row.kernel.startswith("spmm_sm") for row in rows)
    sparse = output(model, inputs)
    assert 1e-3 < relative_error(sparse, dense) < 1
    rtlynx.remove(model)
    assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("method", ["paper", "split"])
@pytest.mark.parametrize("family", sorted(TINY))  # calibration knows layers, not models
def test_calibration_lowers_the_error(family: str, method: str) -> None:
    tiny = TINY[family]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    dense = output(model, inputs)
    rtlynx.apply(model, rtlynx.SparsityConfig(branch="input" if method == "paper" else "dropped", small_m="sparse"))
    before = relative_error(output(model, inputs), dense)
    rtlynx.calibrate(model, run=lambda: output(model, inputs), method=method, rank=64, progress=False)
    assert relative_error(output(model, inputs), dense) < before


def test_a_compiled_model_matches_eager() -> None:
    tiny = TINY["flux"]
    model, inputs = tiny.build("cuda", torch.bfloat16), tiny.inputs("cuda", torch.bfloat16)
    rtlynx.apply(model, ALWAYS)
    eager = output(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    assert relative_error(output(model, inputs), eager) < 3e-2
