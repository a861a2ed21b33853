"""The problems that GPU tests run reach what they are meant to: every layer of the models, every GEMM kernel at its edges."""

from __future__ import annotations

from full_size_models import CASES
from shapes import MODEL_SHAPES


def test_every_layer_of_the_full_size_models_is_among_the_shapes() -> None:
    layers = {(n, k) for case in CASES.values() for _, k, n in case.sparse}
    assert layers <= {(n, k) for _, n, k in MODEL_SHAPES}
    assert len(MODEL_SHAPES) == len(set(MODEL_SHAPES))
