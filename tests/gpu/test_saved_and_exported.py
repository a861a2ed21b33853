"""Models that are copied, saved, loaded, exported and compiled on a GPU, in bf16, fp8 and compact. On the CPU: tests/integration."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import rtlynx
from rtlynx import RTLynxConfig, SparseLinear, SparsityConfig
from rtlynx.apply import applied_config
from rtlynx.eligibility import sparse_layers
from rtlynx.fp8 import missing_kernels
from sparse_models import sparse
from tiny_models import TINY, output, relative_error

BF16 = torch.bfloat16
FLUX = TINY["flux"]
# diffusers and torch warn of their own deprecations on these paths
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(params=["model", "fp8", "compact"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "model" and (reason := missing_kernels(torch.device("cuda", torch.cuda.current_device()))):
        pytest.skip(reason)
    return str(request.param)


def config(kind: str) -> SparsityConfig:
    precision: Any = "model" if kind == "model" else "fp8"
    return SparsityConfig(rank=16, selection="weight", small_m="sparse", precision=precision)  # layers as small as these are faster dense


def built(kind: str) -> Any:
    """Everything prepared where it runs."""
    precision = "model" if kind == "model" else "fp8"
    model = sparse("flux", BF16, "cuda", precision=precision, selection="weight", small_m="sparse")
    return as_kind(model, kind)


def as_kind(model: Any, kind: str) -> Any:
    if kind == "compact":
        assert rtlynx.compact(model) > 0
    assert_is(model, kind)
    return model


def assert_is(model: Any, kind: str) -> None:
    layers = sparse_layers(model).values()
    assert len(layers) == FLUX.sparse_layers
    assert all(layer.is_compact == (kind == "compact") and (layer.weight_fp8 is None) == (kind != "fp8") for layer in layers)


# ---- copies ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_on_their_own(copied: Callable[[nn.Module], Any], kind: str) -> None:
    model, inputs = built(kind), FLUX.inputs("cuda", BF16)
    want = output(model, inputs)
    twin = copied(model)
    assert torch.equal(output(twin, inputs), want)
    of_model, of_twin = ({id(layer.input_group) for layer in sparse_layers(each).values() if layer.input_group} for each in (model, twin))
    assert of_model and of_model.isdisjoint(of_twin)
    places = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    assert places.isdisjoint(tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers()))
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert relative_error(output(twin, inputs), want) > 0.5
    assert torch.equal(output(model, inputs), want)


@pytest.mark.parametrize(("assign", "held_on"), [(False, "cuda"), (True, "cuda"), (False, "cpu")])
def test_state_dict_round_trip(assign: bool, held_on: str, kind: str) -> None:
    model, inputs = built(kind), FLUX.inputs("cuda", BF16)
    want = output(model, inputs)
    other = rtlynx.apply(FLUX.build("cuda", BF16), config(kind))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    rtlynx.refresh(other)
    assert relative_error(output(other, inputs), want) > 0.5  # which also prepares its calls
    state = {name: tensor.to(held_on) for name, tensor in model.state_dict().items()}
    assert not any(other.load_state_dict(state, assign=assign))
    assert torch.equal(output(other, inputs), want)


# ---- quantization_config -----------------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[..., Any]] = {
    "to": lambda path, **given: FluxTransformer2DModel.from_pretrained(path, torch_dtype=BF16, **given).to("cuda"),
    "device_map": lambda path, **given: FluxTransformer2DModel.from_pretrained(path, torch_dtype=BF16, device_map="cuda", **given),
}


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded(way: str, kind: str, tmp_path: Path) -> None:
    inputs = FLUX.inputs("cuda", BF16)
    FLUX.build("cpu", BF16).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    model = WAYS[way](tmp_path / "dense", quantization_config=RTLynxConfig(config(kind)))
    dense = output(FLUX.build("cuda", BF16), inputs)
    plain = output(model, inputs)
    rtlynx.calibrate(model, run=lambda: output(model, inputs), progress=False)
    want = output(as_kind(model, kind), inputs)
    assert 0 < relative_error(want, dense) < relative_error(plain, dense)
    model.save_pretrained(tmp_path / "sparse")
    again = WAYS[way](tmp_path / "sparse")
    assert again.device.type == "cuda" and again.dtype == BF16
    assert applied_config(again) == applied_config(model)
    assert_is(again, kind)
    got = output(again, inputs)
    if way == "device_map" or kind == "compact":
        assert torch.equal(got, want)
    else:  # scores and copies were made before the model came here, and can differ in a bit
        assert relative_error(got, want) < min(2e-2, relative_error(plain, want) / 2)


# ---- export and compile ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer_blocks.0", "single_transformer_blocks.0"])
@torch.no_grad()
def test_exported_blocks(name: str, kind: str) -> None:
    model = built(kind).requires_grad_(False)
    block, seen = model.get_submodule(name), []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    output(model, FLUX.inputs("cuda", BF16))
    handle.remove()
    args, kwargs = seen[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exported = torch.export.export(block, args, kwargs)
        program = exported.module()
    layers = [module for module in block.modules() if isinstance(module, SparseLinear)]
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("sparse_linear" in call for call in calls) == len(layers)

    def ran(forward: Callable[..., Any]) -> Tensor:
        """Of what it was exported with, and of something else."""
        other = {**kwargs, "hidden_states": kwargs["hidden_states"].flip(1)}
        return torch.cat([tensor.flatten() for given in (kwargs, other) for tensor in forward(*args, **given)])

    got, want = ran(program), ran(block)
    for layer in layers:
        layer.dense = True
    assert relative_error(got, want) < min(2e-2, relative_error(ran(block), want))  # eager blocks round less often


SIZES = ((8, 19), (6, 7), (10, 30), (4, 12), (12, 20), (5, 9))
"""Of a picture's side and of a prompt: in batches of two, fewer than 100 tokens of every prompt, and of every other picture."""


@pytest.mark.parametrize(("small_m", "least"), [("sparse", None), ("dense", None), ("dense", 100)])
def test_compiled_blocks_serve_every_size_without_being_told(small_m: str, least: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if least is not None:  # by themselves layers as narrow as these are never sparse
        monkeypatch.setattr("rtlynx.least_tokens._least_tokens", lambda *_arguments: least)
    model = sparse("flux", BF16, "cuda", small_m=small_m)
    sizes = [FLUX.inputs("cuda", BF16, side=side, text=text) for side, text in SIZES]  # type: ignore[call-arg]
    others = FLUX.build("cuda", BF16), sparse("flux", BF16, "cuda", small_m="sparse")
    want, dense, always = ([output(each, inputs) for inputs in sizes] for each in (model, *others))
    are_sparse = {("sparse", None): [True] * 6, ("dense", None): [False] * 6, ("dense", 100): [True, False] * 3}[small_m, least]
    like, unlike = zip(*((b, a) if sparse_now else (a, b) for a, b, sparse_now in zip(dense, always, are_sparse, strict=True)), strict=True)
    assert all(relative_error(got, a) < relative_error(got, b) / 2 for got, a, b in zip(want, like, unlike, strict=True))
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    # The first size for itself, the second for all; the third where other layers are dense then.
    for i, inputs in enumerate(sizes):
        with torch.compiler.set_stance("default" if i < (2 if least is None else 3) else "fail_on_recompile"):
            got = output(model, inputs)
        assert relative_error(got, want[i]) < min(3e-2, relative_error(got, unlike[i]))
