"""What holds of every family whose blocks do what is between their layers in fewer passes."""

from __future__ import annotations

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

from fused_models import as_diffusers_has_it, sparse
from tiny_models import output, relative_error

FAMILIES = ["flux", "qwen_image", "wan"]
BLOCKS = {"flux": 1 + 2, "qwen_image": 2, "wan": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_block_cache(family: str, rotations: list[int]) -> None:
    model, inputs = sparse(family)
    want = output(model, inputs)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    rotations.clear()
    with model.cache_context("test"):
        first, second = output(model, inputs), output(model, inputs)
    assert torch.equal(first, want) and len(rotations) == 2 * (BLOCKS[family] + 1)  # the second time only the first block runs
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family: str, rotations: list[int]) -> None:
    model, inputs = sparse(family)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("weight") and p.dim() == 2]

    def gradients() -> Tensor:
        loss = model(**inputs, return_dict=False)[0].square().mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    got = gradients()
    assert not rotations
    assert relative_error(got, as_diffusers_has_it(model, gradients)) < 1e-4
