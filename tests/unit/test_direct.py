"""When an op may be called past the dispatcher: never while something else wants to see the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from rtlynx import direct as module
from rtlynx.direct import direct


@pytest.fixture(autouse=True)
def cpu_tensors_count_as_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule about the keys of the tensors there are on every machine."""
    plain = ("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU", "BackendSelect")
    monkeypatch.setattr(module, "_NOT_PLAIN", module._keys_but(plain))


X = torch.randn(2, 4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_plain_tensors_without_gradients(context: Callable[[], AbstractContextManager[object]]) -> None:
    with context():
        assert direct(X, None, nn.Parameter(X), torch.randn(3))


def test_autocast_has_no_rule_for_the_ops() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert direct(X)


def test_gradients_go_through_autograd() -> None:
    assert not direct(X)


class Subclass(torch.Tensor): ...


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, device="meta"),
        X.as_subclass(Subclass),
        FakeTensorMode().from_tensor(X),
        torch._neg_view(X),
        X.to_sparse(),
    ],
    ids=["another device", "subclass", "fake", "negated view", "sparse layout"],
)
def test_other_tensors(tensor: Tensor) -> None:
    with torch.no_grad():
        assert not direct(X, tensor)


@pytest.mark.parametrize("mode", [lambda: torch.device("cpu"), lambda: FlopCounterMode(display=False), FakeTensorMode])
def test_modes(mode: Callable[[], AbstractContextManager[object]]) -> None:
    with torch.no_grad(), mode():
        assert not direct(X)


@pytest.mark.parametrize(
    "run",
    [
        lambda f: torch.vmap(f)(X),
        lambda f: torch.func.functionalize(f)(X),
        lambda f: make_fx(f)(X),
        lambda f: torch.jit.trace(f, (X,), check_trace=False),
        lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)(X),
    ],
    ids=["vmap", "functionalize", "make_fx", "jit.trace", "compile"],
)
def test_traces_and_transforms(run: Callable[[Any], object]) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(direct(x))
        return x + 1

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        run(function)
    assert seen == [False]


def test_on_a_machine_without_a_gpu_nothing_is_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with torch.no_grad():
        assert not direct(X)


def test_a_torch_without_these_names_uses_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOT_PLAIN", 0)
    with torch.no_grad():
        assert not direct(X)
