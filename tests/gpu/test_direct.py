"""Calls past the dispatcher: taken on a GPU without gradients, and the same as the calls through it."""

from __future__ import annotations

import pytest
import torch

from rtlynx import InvalidArgumentError, ops
from rtlynx.direct import direct


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_taken_and_the_same(context: type, monkeypatch: pytest.MonkeyPatch) -> None:
    x, down = torch.randn(70, 256, device="cuda").bfloat16(), torch.randn(256, 16, device="cuda").bfloat16()
    weight, up, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((64, 256), (64, 16), (64,)))
    with context():
        assert direct(x, weight, None)
        sparse = ops.sparsify(x, comp_down=down)
        out = ops.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale, sparse.branch, up, bias)
        monkeypatch.setattr(ops, "direct", lambda *_: False)
        through = ops.sparsify(x, comp_down=down)
        want = ops.sparse_linear(through.values, through.metadata, weight, through.row_scale, through.branch, up, bias)
    assert all(torch.equal(a, b) for a, b in zip(sparse, through, strict=True))
    assert torch.equal(out, want)


def test_refusals_are_the_same() -> None:
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(InvalidArgumentError, match="K = 100"):
            ops.sparsify(torch.randn(8, 100, device="cuda").half())
        with context, pytest.raises(InvalidArgumentError, match="device cpu"):
            ops.sparsify(torch.randn(8, 128, device="cuda").half(), score=torch.ones(128))


def test_gradients_still_flow() -> None:
    x = torch.randn(8, 128, device="cuda").bfloat16().requires_grad_()
    ops.sparsify(x).values.sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() == 8 * 64
