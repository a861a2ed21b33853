"""What holds of every family whose blocks do what is between their layers in fewer passes."""

from __future__ import annotations

import warnings
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers import transformer_flux, transformer_qwenimage, transformer_wan
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.utils import counters

import rtlynx
from fused_models import ALL, F32, as_diffusers_has_it, sparse
from tiny_models import output, relative_error

FAMILIES = ["flux", "qwen_image", "wan"]
BLOCKS = {"flux": 1 + 2, "qwen_image": 2, "wan": 2}
ROTATED_BY = {"flux": torch.stack, "qwen_image": torch.view_as_complex, "wan": torch.empty_like}
"""An operation of diffusers' own rotary embedding."""
ATTENTIONS = {
    "flux": (transformer_flux, 1),
    "qwen_image": (transformer_qwenimage, 1),
    "wan": (transformer_wan, 3),  # to the video, the text and the image
}
"""Where a family's attention is dispatched, and how many there are in a block."""
ADAPTED = {
    "flux": ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "to_add_out", "norm1.linear", "net.2"],
    "qwen_image": ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "to_add_out", "img_mod.1", "net.2"],
    "wan": ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "net.0.proj", "net.2"],
}
"""Layers to adapt, of every kind that a fused block calls or reads the weight of."""


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


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_are_as_before(family: str, rotations: list[int]) -> None:
    model, inputs = sparse(family)
    want = output(model, inputs)
    rotations.clear()
    torch._dynamo.reset()
    counters.clear()
    targets: set[Any] = set()

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        targets.update(node.target for node in graph.graph.nodes)
        return graph

    model.compile_repeated_blocks(fullgraph=True, backend=keep)
    torch.testing.assert_close(output(model, inputs), want, rtol=1e-4, atol=1e-4)
    assert not rotations and not counters["graph_break"]
    assert ROTATED_BY[family] in targets and torch.addcmul not in targets


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_offloaded_one_by_one(family: str, rotations: list[int]) -> None:
    model, inputs = sparse(family)
    want = output(model, inputs)
    for module in model.modules():
        if not list(module.children()):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    rotations.clear()
    assert relative_error(output(model, inputs), want) < 1e-5 and len(rotations) == 2 * BLOCKS[family]


@pytest.mark.parametrize(("family", "where"), [("flux", "attn"), ("qwen_image", ""), ("wan", ""), ("wan", "attn1")])
def test_a_hook_may_outlive_the_fusion(family: str, where: str, rotations: list[int]) -> None:
    model, inputs = ALL[family].build("cpu", F32), ALL[family].inputs("cpu", F32)
    want = output(model, inputs)
    rtlynx.apply(model)
    block: Any = (model.blocks if family == "wan" else model.transformer_blocks)[0]  # type: ignore[index]
    accelerate.hooks.add_hook_to_module(block.get_submodule(where), accelerate.hooks.ModelHook())
    rtlynx.remove(model)
    assert relative_error(output(model, inputs), want) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(family: str, rotations: list[int]) -> None:
    model, inputs = sparse(family)
    before = output(model, inputs)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        model.add_adapter(LoraConfig(r=4, target_modules=ADAPTED[family], init_lora_weights=False), adapter_name="style")
    styled = {**inputs, "joint_attention_kwargs" if family == "flux" else "attention_kwargs": {"scale": 0.5}}
    rotations.clear()
    got = output(model, styled)
    assert len(rotations) == 2 * BLOCKS[family] and relative_error(got, before) > 1e-3
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, styled))) < 1e-5
    model.delete_adapters("style")
    model.unload_lora()
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_backend_that_was_set(family: str, rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(family)
    want, seen = output(model, inputs), []
    module, of_block = ATTENTIONS[family]
    dispatch = module.dispatch_attention_fn

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(str(kwargs["backend"]))
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", watching)
    model.set_attention_backend("_native_math")
    rotations.clear()
    torch.testing.assert_close(output(model, inputs), want, rtol=1e-3, atol=1e-3)
    blocks = BLOCKS[family]
    assert len(rotations) == 2 * blocks and len(seen) == of_block * blocks and all("_native_math" in name.lower() for name in seen)
