"""The bench of adaLN's shift: every row is measured, and the model is dense again."""

from __future__ import annotations

from rtlynx.bench.quality.sample_shift import measure
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS
from rtlynx.eligibility import sparse_layers
from tiny_pipeline import tiny_pipeline


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
