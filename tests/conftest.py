"""Shared by all tests; being here also makes `tests/tiny_models.py` and `tests/fused_models.py` importable from every folder below."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import ops
from rtlynx.reference import normed

# The tests' matrices are small: a second thread costs more in waiting than it brings, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by what every selection selects from: its input, or the norm of that which it makes."""
    inputs: list[Tensor] = []
    sparsify: Callable[..., Any] = ops.sparsify
    signature = inspect.signature(sparsify)

    def watching(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(x, *args, **kwargs).arguments
        stats, weight, bias = (given.get(f"norm_{name}") for name in ("stats", "weight", "bias"))
        inputs.append(x if stats is None else normed(x, stats, weight, bias))
        return sparsify(x, *args, **kwargs)

    monkeypatch.setattr(ops, "sparsify", watching)
    return inputs
