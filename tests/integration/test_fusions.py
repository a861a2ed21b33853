"""What comes before a sparse layer goes into its selection in diffusers' own blocks: the same results, and aside where it must step."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers import transformer_chroma, transformer_flux, transformer_flux2
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rtlynx
from fused_models import ALL, F32, layers, sparse, unfused
from rtlynx import RTLynxConfig, SparsityConfig, linear, ops
from rtlynx.fusions import fused_layers, fusion, install_fusions, known
from rtlynx.fusions.feed_forward import FeedForward as FusedFeedForward
from rtlynx.least_tokens import NEVER
from tiny_models import output, relative_error

families = pytest.mark.parametrize("family", ALL)

FUSED = {
    "flux": (("gelu_tanh", False), 2, ("gelu_tanh", True), 2),
    "qwen_image": (("gelu_tanh", False), 2 * 2),
    "z_image": (("silu_gate", False), 2 + 1 + 1),
    "flux2": (("silu_gate", False), 2, ("silu_gate", True), 2),
    "sd3": (("gelu_tanh", False), 3 * 2 - 1),  # no text output of the last block
    "pixart": (("gelu_tanh", False), 2),
    "wan": (("gelu_tanh", False), 2),
    "hunyuan_video": (("gelu_tanh", False), 2, ("gelu_tanh", True), 2),  # its refiner's plain SiLU is not fused
    "ltx": (("gelu_tanh", False), 2),
}
"""Family → (activation, whether channels come before), and how many layers take that in."""


@pytest.fixture
def taken_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(activation, whether there was a head) of every selection that had one of them."""
    seen: list[tuple[str, bool]] = []
    sparsify: Callable[..., Any] = ops.sparsify

    def watching(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 9 and (args[9] != "none" or args[11] is not None):
            seen.append((args[9], args[11] is not None))
        return sparsify(*args, **kwargs)

    monkeypatch.setattr(ops, "sparsify", watching)
    return seen


def expected(family: str) -> list[tuple[str, bool]]:
    wanted: list[Any] = list(FUSED[family])
    return sorted(what for what, count in zip(wanted[::2], wanted[1::2], strict=True) for _ in range(count))


@families
@pytest.mark.parametrize("dtype, precision", [(F32, "model"), (torch.bfloat16, "model"), (torch.bfloat16, "fp8")], ids=str)
def test_fused_is_what_it_was_before(family: str, dtype: torch.dtype, precision: str, taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse(family, dtype, precision=precision)
    got = output(model, inputs)
    assert sorted(taken_in) == expected(family)
    want = unfused(model, inputs)
    assert len(taken_in) == len(expected(family))
    # A gated activation is rounded once instead of twice, and what is selected may change with the last bit. In single-stream blocks, whose
    # last layer takes in a head, so is the gated sum behind it. The others give the same bits.
    summed = any(head for _, head in taken_in)
    limit = 1e-6 if dtype == F32 else 0.15 if "silu_gate" in dict(taken_in) else 0.01 if summed else 0
    assert relative_error(got, want) <= limit


@families
def test_what_no_kernel_does_stays_where_it_was(family: str, taken_in: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(family)
    want = unfused(model, inputs)
    monkeypatch.setattr(fusion, "selection_does", lambda device, activation: False)
    assert torch.equal(output(model, inputs), want) and not taken_in
    assert not any(row.fused for row in rtlynx.summary(model))


@families
def test_classes_come_and_go_with_the_configuration(family: str) -> None:
    model = ALL[family].build("cpu", F32)
    before = [(name, type(module)) for name, module in model.named_modules()]
    keys = list(model.state_dict())

    def kinds() -> list[tuple[str, Any]]:
        return [(n, type(m)) for n, m in model.named_modules() if not isinstance(m, nn.Linear)]

    original = [(name, kind) for name, kind in before if kind is not nn.Linear]
    rtlynx.apply(model)
    assert kinds() != original
    assert [(name, kind.__name__) for name, kind in kinds()] == [(name, kind.__name__) for name, kind in original]
    assert list(model.state_dict()) == keys
    rtlynx.apply(model, SparsityConfig(fuse=False))
    assert kinds() == original
    rtlynx.apply(model)
    rtlynx.remove(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_blocks_without_sparse_layers_stay_what_they_are() -> None:
    model = rtlynx.apply(ALL["flux"].build("cpu", F32), SparsityConfig(include=("single_transformer_blocks.0.proj_out",)))
    assert type(model.single_transformer_blocks[0]) is not transformer_flux.FluxSingleTransformerBlock
    assert type(model.single_transformer_blocks[1]) is transformer_flux.FluxSingleTransformerBlock
    assert type(model.transformer_blocks[0].ff) is FeedForward


def test_the_summary_says_what_is_fused() -> None:
    model, _ = sparse("flux")
    rows = {row.name: row for row in rtlynx.summary(model)}
    assert {name: row.fused for name, row in rows.items() if row.fused} == {
        "transformer_blocks.0.ff.net.2": "GELU (tanh)",
        "transformer_blocks.0.ff_context.net.2": "GELU (tanh)",
        "single_transformer_blocks.0.proj_out": "GELU (tanh) and concatenation",
        "single_transformer_blocks.1.proj_out": "GELU (tanh) and concatenation",
    }
    assert "reference (CPU); fused with GELU (tanh) and concatenation" in str(rtlynx.summary(model))
    model.single_transformer_blocks[0].proj_out.dense = True
    assert not {row.name: row for row in rtlynx.summary(model)}["single_transformer_blocks.0.proj_out"].fused
    assert "fused" not in str(rtlynx.summary(rtlynx.apply(model, SparsityConfig(fuse=False))))


# ---- when it steps aside ----------------------------------------------------------------------------------------------------------------


@families
def test_dense_layers_compute_exactly_what_the_dense_model_does(family: str, taken_in: list[tuple[str, bool]]) -> None:
    tiny = ALL[family]
    dense, inputs = tiny.build("cpu", torch.bfloat16), tiny.inputs("cpu", torch.bfloat16)
    want = output(dense, inputs)
    rtlynx.apply(dense)
    for switch in ("dense", "dense_step"):
        for layer in layers(dense):
            setattr(layer, switch, True)
        assert torch.equal(output(dense, inputs), want)
        for layer in layers(dense):
            setattr(layer, switch, False)
    assert not taken_in


def test_few_tokens_are_dense(monkeypatch: pytest.MonkeyPatch, taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse("flux")  # 2 · 64 image tokens and 2 · 19 of text
    monkeypatch.setattr("rtlynx.linear.least_tokens", lambda *_: 100)
    output(model, inputs)
    assert len(taken_in) == 3  # not the text's feed-forward


def test_what_a_feed_forward_takes_in_is_not_asked_while_it_is_dense(
    monkeypatch: pytest.MonkeyPatch, taken_in: list[tuple[str, bool]]
) -> None:
    asked: list[nn.Module] = []
    of = FusedFeedForward.fusion
    monkeypatch.setattr(FusedFeedForward, "fusion", lambda self: asked.append(self) or of(self))
    monkeypatch.setattr(linear, "least_tokens", lambda *_: NEVER)
    dense, (model, inputs) = ALL["pixart"].build("cpu", F32), sparse("pixart")
    feed_forwards = [module for module in model.modules() if isinstance(module, FusedFeedForward)]
    asked.clear()
    for _ in range(2):
        assert torch.equal(output(model, inputs), output(dense, inputs))
    assert asked == feed_forwards and not taken_in  # in the first call
    for layer in layers(model):
        layer.small_m = "sparse"
    output(model, inputs)
    assert asked == 2 * feed_forwards and len(taken_in) == len(feed_forwards)


@families
def test_hooks_on_a_layer_see_its_input(family: str, taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse(family)
    want = unfused(model, inputs)
    widths: list[tuple[int, int]] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: widths.append((args[0].shape[-1], layer.in_features)))
        for layer in fused_layers(model)
    ]
    assert torch.equal(output(model, inputs), want)
    assert not taken_in and len(widths) == len(handles) and all(seen == k for seen, k in widths)
    for handle in handles:
        handle.remove()
    output(model, inputs)
    assert len(taken_in) == len(handles)


@pytest.mark.parametrize("where", ["net.0", "net.1", "net.2"])
def test_hooks_on_what_is_skipped_run(where: str, taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse("qwen_image")
    calls: list[None] = []
    model.transformer_blocks[0].img_mlp.get_submodule(where).register_forward_hook(lambda *_: calls.append(None))
    output(model, inputs)
    assert len(calls) == 1 and len(taken_in) == 3


def test_calibration_gives_the_same_compensation() -> None:
    compensations = []
    for fuse in (True, False):
        model, inputs = ALL["flux"].build("cpu", F32), ALL["flux"].inputs("cpu", F32)
        rtlynx.apply(model, SparsityConfig(rank=16, fuse=fuse))
        rtlynx.calibrate(model, run=lambda model=model, inputs=inputs: output(model, inputs), progress=False)
        compensations.append([layer.comp_down for layer in layers(model)])
        assert len(fused_layers(model)) == (4 if fuse else 0)
    for got, want in zip(*compensations, strict=True):
        torch.testing.assert_close(got, want)


def test_adapters_on_the_fused_layers(taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse("flux")
    before = output(model, inputs)
    taken_in.clear()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        model.add_adapter(LoraConfig(r=4, target_modules=["net.2", "proj_out"], init_lora_weights=False), adapter_name="style")
    got = output(model, inputs)
    assert not taken_in and relative_error(got, before) > 1e-3
    assert torch.equal(got, unfused(model, inputs))
    model.delete_adapters("style")
    model.unload_lora()
    assert torch.equal(output(model, inputs), before) and len(taken_in) == 4


def test_adapters_on_the_layers_before_them(taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse("flux")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(LoraConfig(r=4, target_modules=["net.0.proj", "proj_mlp"], init_lora_weights=False))
    got = output(model, inputs)
    assert len(taken_in) == 4
    assert relative_error(got, unfused(model, inputs)) < 1e-6


def test_active_dropout_is_not_skipped(taken_in: list[tuple[str, bool]]) -> None:
    block = nn.Sequential(FeedForward(64, dropout=0.5, activation_fn="gelu"))
    rtlynx.apply(block, SparsityConfig(include=("**",)))
    x = torch.randn(5, 64)
    with torch.no_grad():
        block(x)
        assert not taken_in
        block.eval()(x)
        assert taken_in == [("gelu", False)]
        block.train()[0].net[1].p = 0.0
        block(x)
    assert len(taken_in) == 2


@pytest.mark.parametrize(
    "activation, fused",
    [("gelu", "gelu"), ("gelu-approximate", "gelu_tanh"), ("swiglu", "silu_gate"), ("geglu", None), ("linear-silu", None)],
)
@pytest.mark.parametrize("final_dropout", [False, True])
def test_feed_forwards(activation: str, fused: str | None, final_dropout: bool, taken_in: list[tuple[str, bool]]) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(FeedForward(64, activation_fn=activation, final_dropout=final_dropout)).eval()
    rtlynx.apply(block, SparsityConfig(include=("**",)))
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        got = block(x)
    assert taken_in == ([(fused, False)] if fused else [])
    install_fusions(block, False)
    with torch.no_grad():
        torch.testing.assert_close(got, block(x))


def test_a_subclass_of_a_known_block_is_another_block() -> None:
    class Mine(FeedForward):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(hidden_states)  # type: ignore[no-any-return]

    block = nn.Sequential(Mine(64, activation_fn="gelu"))
    rtlynx.apply(block, SparsityConfig(include=("**",)))
    assert type(block[0]) is Mine


def test_a_block_that_was_wrapped_before_is_left_alone(taken_in: list[tuple[str, bool]], caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = ALL["flux"].build("cpu", F32), ALL["flux"].inputs("cpu", F32)
    accelerate.hooks.add_hook_to_module(model.single_transformer_blocks[0], accelerate.hooks.ModelHook())
    with caplog.at_level(logging.INFO, "rtlynx"):
        rtlynx.apply(model)
    assert "a FluxSingleTransformerBlock stays as it is: its forward is wrapped by a hook" in caplog.text
    assert sum(bool(row.fused) for row in rtlynx.summary(model)) == 3
    output(model, inputs)
    assert len(taken_in) == 3


def test_an_attention_processor_of_the_users_is_called(taken_in: list[tuple[str, bool]]) -> None:
    class Mine(transformer_flux2.Flux2ParallelSelfAttnProcessor):
        pass

    model, inputs = sparse("flux2")
    for block in model.single_transformer_blocks:
        block.attn.processor = Mine()
    output(model, inputs)
    assert len(taken_in) == 2  # the feed-forwards


@pytest.mark.parametrize("change", ["parameter", "name"])
def test_another_forward_in_diffusers_is_left_alone(change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    block = transformer_flux.FluxSingleTransformerBlock

    def with_parameter(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states

    def with_name(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):  # type: ignore[no-untyped-def]
        return self.norm_of_another_kind(hidden_states)

    known.fused_class.cache_clear()
    monkeypatch.setattr(block, "forward", {"parameter": with_parameter, "name": with_name}[change])
    with caplog.at_level(logging.INFO, "rtlynx"):
        model = rtlynx.apply(ALL["flux"].build("cpu", F32))
    known.fused_class.cache_clear()
    assert type(model.single_transformer_blocks[0]) is block and type(model.transformer_blocks[0].ff) is not FeedForward
    assert f"FluxSingleTransformerBlock stays as it is: its forward {'takes' if change == 'parameter' else 'uses norm_of'}" in caplog.text


# ---- what users do with the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "z_image", "flux2", "hunyuan_video"])
def test_gradients_are_those_of_the_unfused_model(family: str) -> None:
    model, inputs = sparse(family)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(("weight", "comp_up")) and p.dim() == 2]
    results = []
    for enabled in (True, False):
        install_fusions(model, enabled)
        sample = model(**inputs, return_dict=False)[0]
        loss = torch.stack([each.square().mean() for each in sample]).sum()
        results.append(torch.autograd.grad(loss, trained, allow_unused=True))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@families
def test_copies_are_fused_and_can_be_removed(family: str, copied: Callable[[Any], Any], taken_in: list[tuple[str, bool]]) -> None:
    model, inputs = sparse(family)
    want = output(model, inputs)
    taken_in.clear()
    twin = copied(model)
    assert torch.equal(output(twin, inputs), want)
    assert sorted(taken_in) == expected(family)
    rtlynx.remove(twin)
    assert not fused_layers(twin) and fused_layers(model)
    assert all(type(a) is type(b) for a, b in zip(twin.modules(), ALL[family].build("cpu", F32).modules(), strict=True))


@families
def test_loading_with_a_quantization_config(family: str, tmp_path: Path, taken_in: list[tuple[str, bool]]) -> None:
    dense, inputs = ALL[family].build("cpu", F32), ALL[family].inputs("cpu", F32)
    dense.save_pretrained(tmp_path / "dense")
    for fuse in (True, False):
        taken_in.clear()
        model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=RTLynxConfig(fuse=fuse))
        output(model, inputs)
        assert sorted(taken_in) == (expected(family) if fuse else [])
    model.save_pretrained(tmp_path / "sparse")
    taken_in.clear()
    output(type(dense).from_pretrained(tmp_path / "sparse"), inputs)
    assert not taken_in


def test_a_hook_on_a_block_may_outlive_the_fusion() -> None:
    model, inputs = ALL["flux"].build("cpu", F32), ALL["flux"].inputs("cpu", F32)
    want = output(model, inputs)
    rtlynx.apply(model)
    blocks = [model.single_transformer_blocks[0], model.transformer_blocks[0].ff]
    for block in blocks:
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook())
    rtlynx.remove(model)
    assert torch.equal(output(model, inputs), want)
    for block in blocks:
        accelerate.hooks.remove_hook_from_module(block)
    assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize("family", [name for name in ALL if name != "pixart"])  # whose model names no repeated blocks
def test_compiles_whole_for_any_number_of_tokens(family: str) -> None:
    if not getattr(type(ALL[family].build("meta", F32)), "_repeated_blocks", None):
        pytest.skip("diffusers names no blocks of this model to compile")
    model, inputs = sparse(family)
    want = output(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(model, inputs), want, rtol=1e-4, atol=1e-4)
    for layer in layers(model):  # the original forward is traced as well
        layer.dense = True
    torch.testing.assert_close(output(model, inputs), output(ALL[family].build("cpu", F32), inputs), rtol=1e-4, atol=1e-4)
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", ["flux", "qwen_image", "flux2"])
def test_one_graph_takes_the_activation_in_for_any_number_of_tokens(family: str) -> None:
    model, _ = sparse(family)
    inputs: Any = ALL[family].inputs
    sizes = [inputs("cpu", F32, side=side, text=text) for side, text in ((8, 19), (6, 7), (10, 30), (4, 12))]
    want = [output(model, size) for size in sizes]
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=keep)
    for i, size in enumerate(sizes):  # the second size makes sizes symbolic
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            torch.testing.assert_close(output(model, size), want[i], rtol=1e-4, atol=1e-4)
    activation = str(FUSED[family][0][0])  # type: ignore[index]
    calls = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.ops.rtlynx.sparsify]
    assert calls and sum(activation in node.args for node in calls) >= len(graphs)


@pytest.mark.parametrize("mask", [False, True])
def test_chromas_single_stream_block(mask: bool, taken_in: list[tuple[str, bool]]) -> None:
    torch.manual_seed(0)
    block = transformer_chroma.ChromaSingleTransformerBlock(128, 4, 32).eval()
    model = rtlynx.apply(nn.ModuleDict({"single": block}), SparsityConfig(include=("**.proj_out",)))
    angles = torch.randn(11, 32)
    args = torch.randn(2, 11, 128), torch.randn(2, 3, 128), (angles.cos(), angles.sin()), torch.ones(2, 11) if mask else None
    with torch.no_grad():
        got = model["single"](*args)
        assert taken_in == [("gelu_tanh", True)]
        install_fusions(model, False)
        assert type(block) is transformer_chroma.ChromaSingleTransformerBlock
        torch.testing.assert_close(got, block(*args))
