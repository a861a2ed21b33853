"""Queries and keys normed, concatenated and rotated by one op, eager and compiled: the same results; other ways where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import normalization
from diffusers.models.transformers import transformer_chroma
from test_compile_cpu import graphs_of_a_whole_model, sizes
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fused_models
import rtlynx
from fused_models import F32, as_diffusers_has_it, layers
from rtlynx import SparsityConfig
from rtlynx.fusions import install_fusions, rotary
from tiny_models import output, relative_error

CALLS = {"flux": [2, 2] + [1, 1] * 2, "qwen_image": [2, 2] * 2}
"""Of how many parts queries and keys are, block by block."""


def sparse(family: str, dtype: torch.dtype = F32, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A small model whose norms' weights differ, and its inputs."""
    model, inputs = fused_models.sparse(family, dtype, **config)
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, (nn.RMSNorm, normalization.RMSNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, inputs


@pytest.mark.parametrize("projections", ["apart", "fused"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CALLS)
def test_the_same_results(
    family: str, dtype: torch.dtype, projections: str, in_one_pass: list[int], rotations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = sparse(family, dtype)
    if projections == "fused" and family == "flux":
        model.fuse_qkv_projections()
    for layer in layers(model):  # what is selected may change with a last bit, and everything after it
        layer.dense = True
    got = output(model, inputs)
    assert in_one_pass == CALLS[family] and not rotations
    want = as_diffusers_has_it(model, lambda: output(model, inputs))
    assert relative_error(got, want) < (1e-5 if dtype == F32 else 1e-2)
    monkeypatch.setattr("rtlynx.norm_rotary.available", lambda device: False)
    assert relative_error(got, output(model, inputs)) < (1e-5 if dtype == F32 else 1e-2)
    assert rotations == CALLS[family] == in_one_pass


def test_the_same_results_of_flux2(in_one_pass: list[int], rotations: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse("flux2")
    got = output(model, inputs)
    assert in_one_pass == [2, 2] * len(model.transformer_blocks) + [1, 1] * len(model.single_transformer_blocks) and not rotations
    monkeypatch.setattr(rotary, "rotates", lambda *_: False)
    assert relative_error(got, output(model, inputs)) < 1e-5


def test_chromas_attention(in_one_pass: list[int]) -> None:
    torch.manual_seed(0)
    double = transformer_chroma.ChromaTransformerBlock(128, 4, 32)
    rtlynx.apply(nn.ModuleList([double]).eval(), SparsityConfig(include=("**.to_q",), share_inputs=False))
    angles = torch.randn(11, 16).repeat_interleave(2, 1)
    x, text, temb = torch.randn(2, 8, 128), torch.randn(2, 3, 128), torch.randn(2, 12, 128)
    with torch.no_grad():
        got = double(x, text, temb, (angles.cos(), angles.sin()), torch.rand(2, 11) < 0.7)
    assert in_one_pass == [2, 2] and all(each.isfinite().all() for each in got)


def test_without_fusions_nothing_is_changed(in_one_pass: list[int]) -> None:
    for family in CALLS:
        model, inputs = sparse(family, fuse=False)
        output(model, inputs)
        install_fusions(model)
        install_fusions(model, False)
        output(model, inputs)
    assert not in_one_pass


# ---- when it is not one pass -------------------------------------------------------------------------------------------------------------


def _no_eps(norm: nn.RMSNorm) -> None:
    norm.eps = None


def _no_weight(norm: nn.RMSNorm) -> None:
    norm.weight = None  # type: ignore[assignment]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda norm: norm.register_forward_hook(lambda *_: None),
    "no eps": _no_eps,
    "no weight": _no_weight,
    "another dtype": lambda norm: norm.bfloat16(),
    "a forward of its own": lambda norm: setattr(norm, "forward", norm.forward),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own
@pytest.mark.parametrize("change", CHANGES)
def test_a_norm_that_is_something_else(change: str, in_one_pass: list[int], rotations: list[int]) -> None:
    model, inputs = sparse("flux")
    for norm in ("norm_q", "norm_added_k"):
        CHANGES[change](getattr(model.transformer_blocks[0].attn, norm))
    got = output(model, inputs)
    assert in_one_pass == [1, 1] * 2 and rotations == [2, 2]
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5


def test_gradients_and_autocast(in_one_pass: list[int]) -> None:
    for family in CALLS:
        model, inputs = sparse(family)
        model(**inputs, return_dict=False)[0].sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            output(model, inputs)
    assert not in_one_pass


def test_which_norms_and_heads_are_taken(in_one_pass: list[int]) -> None:
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        for norm in (nn.RMSNorm(32, 1e-6), normalization.RMSNorm(32, 1e-6), None):
            assert rotary.in_one_pass(x, 32, norm, None)
        others = nn.RMSNorm(64, 1e-6), nn.LayerNorm(32), normalization.RMSNorm(32, 1e-6, bias=True), nn.RMSNorm((1, 32), 1e-6)
        for norm in (*others, nn.RMSNorm(32, 1e-6, elementwise_affine=False), normalization.RMSNorm(32, 1e-6, elementwise_affine=False)):
            assert not rotary.in_one_pass(x, 32, None, norm)
        assert not rotary.in_one_pass(x, 36) and not rotary.in_one_pass(x, 264) and not rotary.in_one_pass(x.double(), 32)
    assert not rotary.in_one_pass(x, 32)


def test_one_row_of_angles_for_all_tokens(in_one_pass: list[int]) -> None:
    angles = torch.randn(1, 16).repeat_interleave(2, 1)
    with torch.no_grad():
        (got,) = rotary.normed_and_rotated([([torch.randn(1, 5, 2, 32)], [None])], (angles.cos(), angles.sin()))
    assert got.shape == (1, 5, 2, 32) and not in_one_pass


def test_attention_without_norms(in_one_pass: list[int]) -> None:
    model, inputs = sparse("qwen_image")
    for block in model.transformer_blocks:
        block.attn.norm_q = block.attn.norm_k = block.attn.norm_added_q = block.attn.norm_added_k = None
    got = output(model, inputs)
    assert in_one_pass == CALLS["qwen_image"]
    assert relative_error(got, as_diffusers_has_it(model, lambda: output(model, inputs))) < 1e-5


# ---- compiled ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image"])
def test_compiled_blocks_serve_every_size(family: str, in_one_pass: list[int]) -> None:
    model, _ = sparse(family)
    want = [output(model, inputs) for inputs in sizes(family)]
    calls = list(in_one_pass)
    in_one_pass.clear()
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for i, inputs in enumerate(sizes(family)):  # the second size makes sizes symbolic
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            torch.testing.assert_close(output(model, inputs), want[i], rtol=1e-4, atol=1e-4)
    assert in_one_pass == calls and not counters["graph_break"]


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_a_whole_model_is_one_graph_for_every_size(family: str, in_one_pass: list[int]) -> None:
    model, _ = sparse(family)
    graphs = graphs_of_a_whole_model(model, family)
    assert in_one_pass and graphs == ([1, 2, 3] if family == "qwen_image" else [1, 2, 2])  # as dense


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_inductor(family: str, in_one_pass: list[int]) -> None:
    model, inputs = sparse(family)
    want = output(model, inputs)
    in_one_pass.clear()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    assert relative_error(output(model, inputs), want) < 1e-4
    assert in_one_pass == CALLS[family]


@pytest.mark.parametrize("family", CALLS)
def test_compiled_with_gradients_it_is_as_before(family: str, in_one_pass: list[int]) -> None:
    model, inputs = sparse(family)

    def gradient() -> Tensor:
        given = {**inputs, "hidden_states": inputs["hidden_states"].clone().requires_grad_()}
        model(**given, return_dict=False)[0].square().mean().backward()
        return given["hidden_states"].grad  # type: ignore[no-any-return]

    want = gradient()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(), want, rtol=1e-4, atol=1e-6)
    assert not in_one_pass


@torch.no_grad()
def test_exported(in_one_pass: list[int]) -> None:
    model, inputs = sparse("flux")
    block, seen = model.transformer_blocks[0], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    output(model, inputs)
    handle.remove()
    ((args, kwargs),) = seen
    exported = torch.export.export(block, args, kwargs)
    assert sum("rtlynx.norm_rotary" in str(node.target) for node in exported.graph.nodes) == 2
    for got, want in zip(exported.module()(*args, **kwargs), block(*args, **kwargs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
