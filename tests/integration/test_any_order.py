"""What users do to a sparse model, in any order: its dense function is that of a dense twin, and nothing prepared is ever stale.

Hypothesis draws sequences of steps and shortens one that fails.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from peft import LoraConfig
from torch import nn

import rtlynx
from rtlynx import Compensation, RTLynxConfig, SparseLinear, SparsityConfig
from rtlynx.eligibility import canonical, linear_layers, sparse_layers
from sparse_models import MODELS
from tiny_models import output, relative_error

CONFIGS = st.builds(
    SparsityConfig,
    rank=st.sampled_from([0, 16]),
    branch=st.sampled_from(["none", "input", "dropped"]),
    selection=st.sampled_from(["magnitude", "weight"]),
    precision=st.sampled_from(["model", "fp8"]),
    norm_compensation=st.booleans(),
    share_inputs=st.booleans(),
    adaln_shift=st.booleans(),
    dense_first=st.sampled_from([0.0, 0.3]),
    fuse=st.booleans(),
    skip=st.sampled_from([(), ("*.to_k",), ("single_transformer_blocks.*",)]),
)


def fused_projections(model: nn.Module) -> bool:
    """Whether its state dict fits no model that is newly made."""
    return any("to_qkv" in name for name, _ in linear_layers(model))


class AnyOrder(RuleBasedStateMachine):
    """A model, and a dense twin that has seen the same adapters."""

    family = "flux"

    def new(self) -> Any:
        return MODELS[self.family].build("cpu", torch.float32)

    def __init__(self) -> None:
        super().__init__()
        self.inputs = MODELS[self.family].inputs("cpu", torch.float32)
        self.model: Any = self.new()
        self.twin: Any = copy.deepcopy(self.model)
        self.adapters: list[str] = []
        self.fused = False
        self.saved: Compensation | None = None

    # ---- steps ---------------------------------------------------------------------------------------------------------------------------

    @rule(config=CONFIGS)
    def apply(self, config: SparsityConfig) -> None:
        rtlynx.apply(self.model, config)

    @rule()
    def remove(self) -> None:
        rtlynx.remove(self.model)
        assert torch.equal(output(self.model, self.inputs), output(self.twin, self.inputs))

    @precondition(lambda self: sparse_layers(self.model))
    @rule(
        selection=st.sampled_from([("shift",), ("permutation",), ("shift", "permutation")]),
        method=st.sampled_from([None, "paper", "split", "refit", "joint"]),
        bias=st.sampled_from([0, 1, 2]),
        share=st.booleans(),
    )
    def calibrate(self, selection: tuple[str, ...], method: str | None, bias: int, share: bool) -> None:
        options: dict[str, Any] = {"selection": selection, "method": method, "bias": bias, "share": share}
        rtlynx.calibrate(self.model, run=lambda: output(self.model, self.inputs), rank=16, progress=False, tokens_per_channel=1, **options)

    @precondition(lambda self: sparse_layers(self.model))
    @rule()
    def save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rtlynx.save_compensation(self.model, Path(folder) / "c.safetensors")
            self.saved = Compensation.load(Path(folder) / "c.safetensors")
            before = output(self.model, self.inputs)
            self.saved.apply_to(self.model)
        torch.testing.assert_close(output(self.model, self.inputs), before)

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        before = output(self.model, self.inputs)
        try:
            self.saved.apply_to(self.model)
        except rtlynx.CompensationMismatchError:
            assert torch.equal(output(self.model, self.inputs), before)

    @precondition(lambda self: len(self.adapters) < 2 and not self.fused)
    @rule()
    def add_adapter(self) -> None:
        name = "two" if "one" in self.adapters else "one"
        targets = [canonical(name) for name, _ in linear_layers(self.twin) if "lora_" not in name][::2]
        for each in (self.model, self.twin):
            torch.manual_seed(len(name))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's own
                each.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name=name)
        self.adapters.append(name)

    @precondition(lambda self: self.adapters and not self.fused)
    @rule(weight=st.sampled_from([0.0, 0.5, 1.0]))
    def set_adapters(self, weight: float) -> None:
        for each in (self.model, self.twin):
            each.set_adapters(self.adapters, [weight] * len(self.adapters))

    @precondition(lambda self: self.adapters and not self.fused)
    @rule()
    def fuse(self) -> None:
        for each in (self.model, self.twin):
            each.fuse_lora()
        self.fused = True

    @precondition(lambda self: self.fused)
    @rule()
    def unfuse(self) -> None:
        for each in (self.model, self.twin):
            each.unfuse_lora()
        self.fused = False

    @precondition(lambda self: self.adapters and not self.fused)
    @rule()
    def unload(self) -> None:
        for each in (self.model, self.twin):
            each.unload_lora()
        self.adapters.clear()

    @precondition(lambda self: not self.adapters and hasattr(self.model, "fuse_qkv_projections"))
    @rule()
    def fuse_qkv(self) -> None:
        for each in (self.model, self.twin):
            each.fuse_qkv_projections()

    @precondition(lambda self: not self.adapters and hasattr(self.model, "unfuse_qkv_projections"))
    @rule()
    def unfuse_qkv(self) -> None:
        for each in (self.model, self.twin):
            each.unfuse_qkv_projections()

    @rule()
    def copy(self) -> None:
        before = output(self.model, self.inputs)
        self.model = copy.deepcopy(self.model)
        assert torch.equal(output(self.model, self.inputs), before)

    @precondition(lambda self: not self.adapters)
    @rule()
    def pickle(self) -> None:
        before = output(self.model, self.inputs)
        self.model = pickle.loads(pickle.dumps(self.model))
        assert torch.equal(output(self.model, self.inputs), before)

    @rule()
    def reload_state(self) -> None:
        before = output(self.model, self.inputs)
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        assert torch.equal(output(self.model, self.inputs), before)

    @rule()
    def there_and_back(self) -> None:
        before = output(self.model, self.inputs)
        nn.Module.to(nn.Module.to(self.model, torch.float64), torch.float32)  # ModelMixin.to warns about every cast
        torch.testing.assert_close(output(self.model, self.inputs), before)

    @precondition(lambda self: sparse_layers(self.model))
    @rule()
    def another_model(self) -> None:
        """The state dict into a model that was made sparse in the same way."""
        if self.adapters or fused_projections(self.model):
            return  # of which the other model has none
        other = self.new()
        rtlynx.apply(other, self.model.__dict__["rtlynx_config"])
        other.load_state_dict(copy.deepcopy(self.model.state_dict()))
        assert torch.equal(output(other, self.inputs), output(self.model, self.inputs))

    @precondition(lambda self: sparse_layers(self.model) and not self.adapters)
    @rule()
    def compact_copy(self) -> None:
        other, before = copy.deepcopy(self.model), output(self.model, self.inputs)
        try:
            rtlynx.compact(other)
        except rtlynx.InvalidArgumentError:
            assert torch.equal(output(other, self.inputs), before)
            return
        config, compacted = other.__dict__["rtlynx_config"], output(other, self.inputs)
        if config.multiplies_densely:  # by the weight in e4m3 then
            assert relative_error(compacted, before) < 0.1
        else:
            torch.testing.assert_close(compacted, before)
        for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert torch.equal(output(again, self.inputs), compacted)
        if not fused_projections(other):
            again = rtlynx.apply(self.new(), config)
            again.load_state_dict(copy.deepcopy(other.state_dict()))
            assert torch.equal(output(again, self.inputs), compacted)

    @precondition(lambda self: sparse_layers(self.model))
    @rule()
    def half_precision_copy(self) -> None:
        other = nn.Module.to(copy.deepcopy(self.model), torch.bfloat16)
        inputs = MODELS[self.family].inputs("cpu", torch.bfloat16)
        half = output(other, inputs)
        assert half.isfinite().all()
        assert relative_error(output(rtlynx.refresh(other), inputs), half) < 0.1  # e4m3 copies of weights that were rounded before
        assert relative_error(half, output(self.model, self.inputs)) < 0.3

    # ---- what always holds ---------------------------------------------------------------------------------------------------------------

    @invariant()
    def the_dense_function_is_the_twins(self) -> None:
        layers = sparse_layers(self.model).values()
        for layer in layers:
            layer.dense = True
        dense = output(self.model, self.inputs)
        for layer in layers:
            layer.dense = False
        assert torch.equal(dense, output(self.twin, self.inputs))

    @invariant()
    def nothing_is_stale(self) -> None:
        sparse = output(self.model, self.inputs)
        assert sparse.isfinite().all()
        assert torch.equal(output(self.model, self.inputs), sparse)
        rtlynx.refresh(self.model)
        assert relative_error(output(self.model, self.inputs), sparse) < 1e-3  # sums that are made anew may round, and select, otherwise

    @invariant()
    def the_summary_lists_every_layer(self) -> None:
        rows = {row.name: row for row in rtlynx.summary(self.model)}
        layers = {canonical(name): layer for name, layer in linear_layers(self.model)}
        assert rows.keys() == layers.keys()
        assert {name for name, row in rows.items() if row.sparse} == {n for n, layer in layers.items() if isinstance(layer, SparseLinear)}


class AnyOrderOfQwenImage(AnyOrder):
    """The same, of a model whose pairs of streams have projections of their own."""

    family = "qwen_image"


class AnyOrderOfALoadedModel(AnyOrder):
    """The same, of a model that diffusers made sparse while it loaded it, and saves and loads again."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.loaded(self.model, quantization_config=RTLynxConfig(rank=16))

    @staticmethod
    def loaded(model: Any, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, **options)

    @precondition(lambda self: not self.adapters and not fused_projections(self.model))
    @precondition(lambda self: "quantization_config" in self.model.config or not sparse_layers(self.model))
    @rule(compact=st.booleans())
    def save_and_load(self, compact: bool) -> None:
        saved = copy.deepcopy(self.model)
        if compact and sparse_layers(saved):
            with contextlib.suppress(rtlynx.InvalidArgumentError):  # a layer that cannot be
                rtlynx.compact(saved)
        again = self.loaded(saved)
        assert str(rtlynx.summary(again)) == str(rtlynx.summary(saved))
        assert torch.equal(output(again, self.inputs), output(saved, self.inputs))
        if not compact:
            self.model = again


TestFlux, TestQwenImage, TestLoaded = AnyOrder.TestCase, AnyOrderOfQwenImage.TestCase, AnyOrderOfALoadedModel.TestCase
TestFlux.settings = TestQwenImage.settings = TestLoaded.settings = settings(
    max_examples=8,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
