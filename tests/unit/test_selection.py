"""Shift and permutation lower what selection loses, find the optimum where it is known, and leave the dense function alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import InvalidArgumentError, SparseLinear
from rtlynx.calibrate.selection import Selection, choose
from rtlynx.calibrate.selection.vectors import weight_norms

K, N = 64, 40
CPU = torch.device("cpu")


def uneven(tokens: int = 3000, seed: int = 0) -> Tensor:
    """Channels with constant parts, and strong ones side by side."""
    rng = torch.Generator().manual_seed(3)
    size, constant = torch.logspace(1, -1, K), 5 * torch.randn(K, generator=rng)
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed)) * size + constant


def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / 8


def chosen(*options: str) -> Selection:
    return choose(options, uneven(), [weight()], Selection(), CPU)


def loss(selection: Selection) -> float:
    return float(selection.loss(uneven(seed=1), weight_norms([weight()])))


def test_every_option_lowers_the_loss_on_held_out_tokens() -> None:
    plain, shift, permutation, both = (loss(chosen(*options)) for options in ((), ("shift",), ("permutation",), ("shift", "permutation")))
    assert shift < 0.6 * plain and permutation < 0.9 * plain
    assert both < min(shift, permutation)


def test_the_shift_of_channels_with_a_constant_is_that_constant() -> None:
    torch.manual_seed(0)
    constant = torch.randn(K) * 3
    x = constant + 0.1 * torch.randn(4000, K)
    selection = choose(("shift",), x, [weight()], Selection(), CPU)
    assert selection.shift is not None
    torch.testing.assert_close(selection.shift, constant, atol=0.03, rtol=0)


def test_one_sided_activations_keep_a_shift_near_zero() -> None:
    x = F.gelu(torch.randn(4000, K, generator=torch.Generator().manual_seed(0)))
    selection = choose(("shift",), x, [weight()], Selection(), CPU)
    assert selection.shift is not None and selection.shift.abs().max() < 0.2 < x.mean(0).min()


def test_groups_are_dealt_by_energy() -> None:
    x = torch.randn(4000, 64) * torch.logspace(2, -2, 64)
    selection = choose(("permutation",), x, [torch.ones(N, 64)], Selection(), CPU)
    assert selection.permutation is not None
    assert selection.permutation.view(-1, 4).tolist() == [[i, i + 16, i + 32, i + 48] for i in range(16)]


@pytest.mark.parametrize("options", [("shift",), ("permutation",), ("shift", "permutation")])
@pytest.mark.parametrize("norm_compensation", [True, False])
def test_the_dense_function_is_unchanged(options: tuple[str, ...], norm_compensation: bool) -> None:
    """With nothing dropped, what the sparse path computes is the dense layer: kept + missed is whole, wherever the options put it."""
    selection = choose(options, uneven(), [weight()], Selection(norm_compensation=norm_compensation), CPU)
    x = uneven(50, seed=2)
    pieces, in_order = selection.pieces(x), selection.gather(weight())
    torch.testing.assert_close(pieces["kept"] + pieces["missed"], pieces["whole"])
    back = pieces["whole"] @ in_order.T + (0 if selection.shift is None else selection.shift @ in_order.T)
    torch.testing.assert_close(back, x @ weight().T, rtol=1e-4, atol=1e-3)


def test_the_layers_dense_switch_and_weight_survive_every_option() -> None:
    layer = SparseLinear.from_linear(nn.Linear(K, N))
    before, x = layer.weight.detach().clone(), uneven(20)
    want = F.linear(x, layer.weight, layer.bias)
    selection = chosen("shift", "permutation")
    layer.set_compensation(shift=selection.shift, permutation=selection.permutation, sparse_weight=torch.randn(N, K))
    layer.dense = True
    assert torch.equal(layer(x), want) and torch.equal(layer.weight, before)
    assert torch.equal(layer.to_linear().weight, before)


def test_a_selected_layer_computes_its_pieces() -> None:
    """Selection, written in float32 here, is what the layer does with the same vectors."""
    layer = SparseLinear.from_linear(nn.Linear(K, N))
    selection, x = chosen("shift", "permutation"), uneven(30)
    layer.set_compensation(shift=selection.shift, permutation=selection.permutation)
    assert selection.shift is not None
    in_order = selection.gather(layer.weight.detach())
    want = (selection.pieces(x)["kept"] + selection.shift) @ in_order.T + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-3)


def test_a_permutation_must_name_every_channel_once() -> None:
    layer = SparseLinear.from_linear(nn.Linear(K, N))
    with pytest.raises(InvalidArgumentError, match="channels missing or twice"):
        layer.set_compensation(permutation=torch.zeros(K, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match="sparse_weight"):
        layer.set_compensation(sparse_weight=torch.zeros(K, N))
