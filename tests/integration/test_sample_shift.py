"""The bench of adaLN's shift: taken from the input and added to the output it changes nothing in the dense model, and much in selection."""

from __future__ import annotations

import torch

import rtlynx
from rtlynx import SparsityConfig
from rtlynx.bench.quality.sample_shift import measure, sample_shifts
from rtlynx.calibrate.collect import all_dense
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS
from rtlynx.eligibility import sparse_layers
from tiny_models import TINY, output, relative_error
from tiny_pipeline import tiny_pipeline


def test_the_dense_model_stays_what_it_is_and_the_sparse_one_does_not() -> None:
    model, inputs = TINY["flux"].build("cpu", torch.float32), TINY["flux"].inputs("cpu", torch.float32)
    dense = output(model, inputs)
    rtlynx.apply(model, SparsityConfig(rank=0, branch="none", small_m="sparse"))
    sparse = output(model, inputs)
    with sample_shifts(model) as names:
        shifted = output(model, inputs)
        with all_dense(sparse_layers(model)):
            assert relative_error(output(model, inputs), dense) < 1e-5
        name = min(names)
        x = torch.randn(5, 128)
        torch.testing.assert_close(sparse_layers(model)[name](x), _alone(model, name, x))  # no shift outside of the model's calls
    assert len(names) == 8 + 2 * 4 and not torch.equal(shifted, sparse)
    assert torch.equal(output(model, inputs), sparse)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _alone(model: torch.nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    layer = rtlynx.SparseLinear.from_linear(
        torch.nn.Linear(128, sparse_layers(model)[name].out_features), SparsityConfig(branch="none", small_m="sparse")
    )
    layer.weight, layer.bias = sparse_layers(model)[name].weight, sparse_layers(model)[name].bias
    return layer(x)  # type: ignore[no-any-return]


def test_every_row_is_measured() -> None:
    pipe = tiny_pipeline()
    rows = measure(pipe, SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), prompts=2, steps=2, ranks=(0, 16))
    assert [(row.shift, row.rank) for row in rows] == [(s, r) for s in ("none", "lloyd", "adaLN", "adaLN, lloyd") for r in (0, 16)]
    assert all(
        0 < row.velocity_rel_err < 1 and 0 < row.attention_rel_err < 1 and 0 < row.mlp_rel_err < 1 and 0 <= row.attribute_accuracy <= 1
        for row in rows
    )
    assert rows[1].attention_rel_err < rows[0].attention_rel_err and rows[7].mlp_rel_err < rows[4].mlp_rel_err
    assert not sparse_layers(pipe.transformer) and not any(module._forward_hooks for module in pipe.transformer.modules())
