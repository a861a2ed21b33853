"""A bias per group of timesteps on a GPU: a captured graph and compiled layers find the row of the step that they are run for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rtlynx
from rtlynx import SparsityConfig
from rtlynx.bias_groups import install_bias_groups

pytestmark = pytest.mark.usefixtures("kernels")

K, N, LEVELS = 512, 256, (0.9, 0.6, 0.1, 0.4)


class Timed(nn.Module):
    """One layer, told the time as the generic recipe's models are: 1000 for noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def timed() -> nn.Module:
    model = rtlynx.apply(Timed(), SparsityConfig(include=("layer",), rank=0, branch="none", small_m="sparse"))
    model.layer.set_compensation(comp_bias=torch.arange(4.0)[:, None].expand(4, N))  # type: ignore[operator]
    install_bias_groups(model)
    return model


def time(level: float) -> Tensor:
    return torch.full((2,), 1000 * level, device="cuda")


@torch.no_grad()
def test_a_graph_of_the_whole_model_reads_the_time_it_is_replayed_with() -> None:
    model, x, now = timed(), torch.randn(300, K, device="cuda", dtype=torch.bfloat16), time(0.5)
    model(x, now)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x, now)
    for level in LEVELS:
        now.copy_(time(level))
        graph.replay()
        got = out.clone()
        assert torch.equal(got, model(x, time(level)))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_layer_reads_the_present_group(mode: str) -> None:
    torch._dynamo.reset()
    model, eager = timed(), timed()
    eager.load_state_dict(model.state_dict())
    model.layer.compile(fullgraph=True, mode=mode)  # type: ignore[operator]
    x = torch.randn(300, K, device="cuda", dtype=torch.bfloat16)
    for level in (0.8, *LEVELS, *LEVELS):  # reduce-overhead warms up first, then captures
        torch.testing.assert_close(model(x, time(level)).clone(), eager(x, time(level)))  # the next group's bias is 1 away
