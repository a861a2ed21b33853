"""The norms of models with sparse layers are one kernel each where torch has one: the same results, and no others than these."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import normalization
from torch import Tensor, nn

import rtlynx
from fused_models import sparse, unfused
from rtlynx.fusions import known, norms
from tiny_models import output, relative_error

NORMS = {"flux": {"AdaLayerNormZero", "AdaLayerNormZeroSingle"}, "z_image": {"RMSNorm"}, "qwen_image": {"RMSNorm"}}
"""Family → which norms it has."""


@pytest.fixture
def norm_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a GPU; which of torch's norms ran with a weight."""
    ran: list[str] = []

    def watched(name: str) -> Callable[..., Tensor]:
        original = getattr(nn.functional, name)

        def call(x: Tensor, shape: Any, weight: Tensor | None = None, *args: Any) -> Tensor:
            if weight is not None:
                ran.append(name)
            return original(x, shape, weight, *args)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(norms, "one_kernel", lambda x: True)
    monkeypatch.setattr(norms, "F", SimpleNamespace(**{name: watched(name) for name in ("rms_norm", "layer_norm")}))
    return ran


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_one_kernel(family: str, norm_kernels: list[str]) -> None:
    model, inputs = sparse(family)
    if family == "flux":
        inputs = {name: value[:1] if isinstance(value, Tensor) and len(value) == 2 else value for name, value in inputs.items()}
    got, ran = output(model, inputs), list(norm_kernels)
    assert {type(module).__name__ for module in model.modules() if type(module).__module__ == norms.__name__} == set(NORMS[family])
    assert ran.count("layer_norm") == (2 + 2 + 2 if family == "flux" else 0) and (ran.count("rms_norm") > 0) == (family != "flux")
    assert relative_error(got, unfused(model, inputs)) < 1e-5
    assert norm_kernels == ran  # none of them unfused
    rtlynx.remove(model)
    assert not any(type(module).__module__.startswith("rtlynx.fusions") for module in model.modules())


def test_several_samples_are_modulated_as_before(norm_kernels: list[str]) -> None:
    block = known.fused_class(normalization.AdaLayerNormZeroSingle)(64)  # type: ignore[misc]
    x, emb = torch.randn(2, 5, 64), torch.randn(2, 64)
    both = block(x, emb)
    assert not norm_kernels
    for i in range(2):
        for got, want in zip(block(x[i : i + 1], emb[i : i + 1]), both, strict=True):
            torch.testing.assert_close(got, want[i : i + 1])
    assert norm_kernels == ["layer_norm"] * 2


@pytest.mark.parametrize("change", ["bias", "dtype", "no weight"])
def test_other_rms_norms_are_as_before(change: str, norm_kernels: list[str]) -> None:
    norm = known.fused_class(normalization.RMSNorm)(64, 1e-6, elementwise_affine=change != "no weight", bias=change == "bias")  # type: ignore[misc]
    x = torch.randn(3, 64)
    if change == "dtype":
        norm.weight.data = norm.weight.data.bfloat16()
    assert torch.equal(norm(x), normalization.RMSNorm.forward(norm, x)) and not norm_kernels


def test_a_norm_that_is_rounded_once_is_no_less_exact(norm_kernels: list[str]) -> None:
    torch.manual_seed(0)
    norm = known.fused_class(normalization.RMSNorm)(256, 1e-6).bfloat16()  # type: ignore[misc]
    norm.weight.data = torch.randn(256).bfloat16()
    x = torch.randn(64, 256).bfloat16()
    wide = x.double()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    got, before = norm(x).double(), normalization.RMSNorm.forward(norm, x).double()
    assert norm_kernels == ["rms_norm"] and (got - want).norm() < (before - want).norm()
