"""What several files of these tests watch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rtlynx import norm_rotary, reference_rotary
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


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU that has the kernel of `rtlynx.norm_rotary`; of how many parts each tensor was that it made, compiled too."""
    seen: list[int] = []
    by_reference = reference_rotary.norm_rotary

    def watching(x: Tensor, cos: Tensor, sin: Tensor, weight: Any, eps: float, first: Tensor | None, *of_first: Any) -> Tensor:
        seen.append(1 if first is None else 2)
        return by_reference(x, cos, sin, weight, eps, first, *of_first)

    monkeypatch.setattr(norm_rotary, "available", lambda device: True)
    monkeypatch.setattr(reference_rotary, "norm_rotary", watching)
    return seen
