"""What several files of these tests watch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rtlynx.fusions import fusion, rotary


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; of how many parts each tensor was that was rotated here."""
    seen: list[int] = []
    rotated = rotary.rotated

    def watching(parts: list[Tensor], rotation: Tensor) -> Tensor:
        seen.append(len(parts))
        return rotated(parts, rotation)

    monkeypatch.setattr(fusion, "eager", lambda x: not torch.compiler.is_compiling())
    monkeypatch.setattr(rotary, "rotated", watching)
    return seen


@pytest.fixture
def others_warnings_are_not_ours() -> Iterator[None]:
    """Those of what a pipeline is made of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(diffusers|peft|transformers|torch)\b.*")
        yield
