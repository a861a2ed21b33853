"""The probes of `rtlynx.search`: gradients through a whole model in half precision."""

from __future__ import annotations

import pytest
import torch

import rtlynx
from rtlynx import SparsityConfig
from rtlynx.calibrate.collect import all_dense
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.trajectory import Trajectory
from rtlynx.search.effects import Effects
from rtlynx.search.options import Unit
from tiny_models import TINY


# The fixture `poisoned_memory` asks for deterministic algorithms, of which the attention that a search takes has none: torch warns.
@pytest.mark.filterwarnings("ignore:.*defaults to a non-deterministic algorithm:UserWarning")
@pytest.mark.parametrize("family", TINY)
def test_probes_are_finite_and_agree_each_time(family: str) -> None:
    tiny = TINY[family]
    model = rtlynx.apply(tiny.build("cuda", torch.bfloat16), SparsityConfig(rank=0, branch="none", small_m="sparse"))
    layers = sparse_layers(model)
    units = [Unit({name: layer}, {0: {name: {}}}) for name, layer in layers.items()]
    trajectory, found = Trajectory(), []
    with all_dense(layers):
        with trajectory.recording(model):
            model(**tiny.inputs("cuda", torch.bfloat16))
        for _ in range(3):
            effects = Effects(units, (None, 0))
            for _ in effects.measure(model, trajectory, probes=2, seed=0):
                pass
            found.append(effects.single)
    assert all(single.isfinite().all() and single[:, 1].sum() > 0 for single in found)
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=0.1, atol=1e-9)
