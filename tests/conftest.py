"""Shared by all tests; being here also makes `tests/tiny_models.py` and `tests/fused_models.py` importable from every folder below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import ops

# The tests' matrices are small: a second thread costs more in waiting than it brings, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by the input of every selection."""
    inputs: list[Tensor] = []
    sparsify: Callable[..., Any] = ops.sparsify

    def watching(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs.append(x)
        return sparsify(x, *args, **kwargs)

    monkeypatch.setattr(ops, "sparsify", watching)
    return inputs
