"""Layers that read one tensor select once, and never from anything but that tensor as it is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import rtlynx
from permutations import free, in_windows
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.sharing import InputGroup

K, N, RANK = 128, 64, 16


class Attention(nn.Module):
    """What the recipe of FLUX.1 calls `attn`, with the MLP's first layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(K, N) for _ in range(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.proj_mlp = nn.Linear(K, 2 * N)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.proj_mlp(x), self.attn.to_q(x), self.attn.to_k(x), self.attn.to_v(x)


class FluxTransformer2DModel(nn.Module):
    """Found by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList(Block() for _ in range(2))


def model(config: SparsityConfig | None = None, shared: bool = True) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    root = rtlynx.apply(FluxTransformer2DModel(), config or SparsityConfig(rank=RANK))
    down = torch.randn(K, RANK) / 8
    for layer in layers(root):
        layer.set_compensation(down if shared else torch.randn(K, RANK) / 8, torch.randn(layer.out_features, RANK) / 8)
    return root


def layers(root: nn.Module) -> list[SparseLinear]:
    return [module for module in root.modules() if isinstance(module, SparseLinear)]


def block(config: SparsityConfig | None = None, shared: bool = True) -> Any:
    return model(config, shared).single_transformer_blocks[0]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, K, generator=rng(seed))


def alone(layer: SparseLinear, x: Tensor) -> Tensor:
    """What the layer computes when nothing is shared."""
    copied = copy.deepcopy(layer)
    copied.input_group = None
    return copied(x)


def kept(layer: SparseLinear) -> object:
    assert isinstance(layer.input_group, InputGroup)
    return layer.input_group._kept


@pytest.mark.parametrize("branch", ["none", "input", "dropped"])
@pytest.mark.parametrize("selection", ["magnitude", "weight"])
@torch.no_grad()
def test_one_selection_serves_all_four(selections: list[Tensor], branch: str, selection: str) -> None:
    config = SparsityConfig(rank=RANK, branch=branch, selection=selection)  # type: ignore[arg-type]
    root = rtlynx.apply(FluxTransformer2DModel(), config) if branch == "none" else model(config)
    b: Any = root.single_transformer_blocks[0]
    x = tokens()
    outputs = b(x)
    assert len(selections) == 1
    assert kept(b.proj_mlp) is None
    for layer, output in zip((b.proj_mlp, b.attn.to_q, b.attn.to_k, b.attn.to_v), outputs, strict=True):
        assert torch.equal(output, alone(layer, x))


@torch.no_grad()
def test_blocks_do_not_share_with_each_other(selections: list[Tensor]) -> None:
    root, x = model(), tokens()
    for b in root.single_transformer_blocks:
        b(x)
    assert len(selections) == 2


@torch.no_grad()
def test_different_branches_are_selected_for_one_by_one(selections: list[Tensor]) -> None:
    b, x = block(shared=False), tokens()
    outputs = b(x)
    assert len(selections) == 4
    assert torch.equal(outputs[1], alone(b.attn.to_q, x))


@torch.no_grad()
def test_two_that_agree_share_although_a_third_does_not(selections: list[Tensor]) -> None:
    b, x = block(), tokens()
    b.attn.to_k.set_compensation()
    outputs = b(x)
    assert len(selections) == 2
    assert torch.equal(outputs[2], alone(b.attn.to_k, x)) and torch.equal(outputs[3], alone(b.attn.to_v, x))


@torch.no_grad()
def test_another_tensor_with_the_same_values_is_another_input(selections: list[Tensor]) -> None:
    b, x = block(), tokens()
    b.attn.to_q(x)
    b.attn.to_k(x.clone())
    assert len(selections) == 2


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[0].mul_(2), lambda x: x.view(-1).copy_(tokens(1).view(-1))])
@torch.no_grad()
def test_a_write_to_the_input_makes_it_another(write: Callable[[Tensor], Tensor]) -> None:
    b, x = block(), tokens()
    b.attn.to_q(x)
    write(x)
    assert torch.equal(b.attn.to_k(x), alone(b.attn.to_k, x))


@pytest.mark.parametrize("name", ["comp_down", "score"])
@torch.no_grad()
def test_a_write_to_what_selection_reads_is_seen(name: str) -> None:
    b, x = block(SparsityConfig(rank=RANK, selection="weight")), tokens()
    b.attn.to_q(x)
    getattr(b.attn.to_k, name).copy_(getattr(b.attn.to_k, name).flip(0))
    assert torch.equal(b.attn.to_k(x), alone(b.attn.to_k, x))


@torch.no_grad()
def test_a_reader_is_served_once(selections: list[Tensor]) -> None:
    # Memory may have been written behind torch's back since it read, by a replayed CUDA graph: a second read is a new round.
    b, x = block(), tokens()
    b.attn.to_q(x)
    b.attn.to_q(x)
    assert len(selections) == 2


@torch.no_grad()
def test_nothing_is_kept_when_the_input_is_gone(selections: list[Tensor]) -> None:
    b, x = block(), tokens()
    b.attn.to_q(x)
    assert kept(b.attn.to_q) is not None
    values = weakref.ref(kept(b.attn.to_q).selection.values)  # type: ignore[attr-defined]
    del x
    selections.clear()
    assert kept(b.attn.to_q) is None and values() is None


def test_with_gradients_every_layer_selects_for_itself(selections: list[Tensor]) -> None:
    b, x = block(), tokens().requires_grad_()
    with torch.no_grad():
        b.attn.to_q(x)
    sum(output.sum() for output in b(x)).backward()
    assert len(selections) == 5
    assert x.grad is not None and kept(b.attn.to_q) is not None
    gradient, x.grad = x.grad, None
    sum(alone(layer, x).sum() for layer in (b.proj_mlp, b.attn.to_q, b.attn.to_k, b.attn.to_v)).backward()
    torch.testing.assert_close(gradient, x.grad)


def test_inference_mode_counts_no_writes_so_nothing_is_kept() -> None:
    b = block()
    with torch.inference_mode():
        x = tokens()
        b.attn.to_q(x)
        x.add_(1)
        assert torch.equal(b.attn.to_k(x), alone(b.attn.to_k, x))
        assert kept(b.attn.to_q) is None


def test_models_die_with_their_last_reference() -> None:
    gc.disable()
    try:
        b = block()
        with torch.no_grad():
            b(tokens())
        layer = weakref.ref(b.attn.to_q)
        del b
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_share_among_themselves(selections: list[Tensor], copied: Callable[[nn.Module], Any]) -> None:
    b, x = block(), tokens()
    b.attn.to_q(x)
    other = copied(b)
    selections.clear()
    other(x)
    assert len(selections) == 1
    assert other.attn.to_q.input_group is not b.attn.to_q.input_group
    assert other.attn.to_q.comp_down is other.attn.to_k.comp_down is not b.attn.to_q.comp_down
    assert copied(b.attn.to_q).sharing == 1  # a layer copied alone reads alone


@pytest.mark.parametrize("selection", ["magnitude", "weight"])
@torch.no_grad()
def test_moved_layers_still_share(selections: list[Tensor], selection: str) -> None:
    b, x = block(SparsityConfig(rank=RANK, selection=selection)), tokens()  # type: ignore[arg-type]
    for layer in layers(b):
        layer.set_compensation(layer.comp_down, layer.comp_up, torch.ones(K))
    b.double().float()
    b.to(torch.bfloat16)
    assert b.attn.to_q.shift is b.proj_mlp.shift and b.attn.to_q.shift.dtype == torch.float32
    b(x.bfloat16())
    assert len(selections) == 1


@torch.no_grad()
def test_a_state_dict_brings_each_layer_its_own_branch() -> None:
    shared, own = model(), model(shared=False)
    for source, target in ((own, shared), (shared, own)):
        want = source.single_transformer_blocks[0](tokens())
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        for got, expected in zip(target.single_transformer_blocks[0](tokens()), want, strict=True):
            assert torch.equal(got, expected)


@torch.no_grad()
def test_stacked_weights_score_the_channels() -> None:
    b = block(SparsityConfig(rank=RANK, selection="weight"))
    stacked = torch.cat([layer.weight for layer in layers(b)])
    assert all(layer.score is b.attn.to_q.score for layer in layers(b))
    torch.testing.assert_close(b.attn.to_q.score, stacked.norm(dim=0))
    b.attn.to_v.weight *= 3
    b.attn.to_v.update_score()
    torch.testing.assert_close(b.proj_mlp.score, torch.cat([layer.weight for layer in layers(b)]).norm(dim=0))


def test_a_layer_that_becomes_dense_leaves_its_group() -> None:
    root = model()
    rtlynx.apply(root, SparsityConfig(rank=RANK, skip=("**.to_v",)))
    b: Any = root.single_transformer_blocks[0]
    assert type(b.attn.to_v) is nn.Linear and not {"input_group", "sharing"} & set(vars(b.attn.to_v))
    assert b.attn.to_q.sharing == 3
    rtlynx.apply(root, SparsityConfig(rank=RANK))
    assert b.attn.to_v.input_group is b.attn.to_q.input_group
    assert b.attn.to_q.sharing == 3 and b.attn.to_v.sharing == 1  # it has no branch yet


@torch.no_grad()
def test_files_hold_every_tensor_apart(tmp_path: Path) -> None:
    root = model()
    for layer in layers(root):
        layer.set_compensation(layer.comp_down, layer.comp_up, torch.ones(K), permutation=torch.randperm(K, generator=rng(1)))
    save_file(root.state_dict(), tmp_path / "model.safetensors")
    again = model(shared=False)
    for layer in layers(again):
        layer.set_compensation(layer.comp_down, layer.comp_up, torch.zeros(K), permutation=torch.randperm(K))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    b: Any = again.single_transformer_blocks[0]
    assert b.attn.to_q.comp_down is b.proj_mlp.comp_down and b.attn.to_q.permutation is b.attn.to_v.permutation
    for got, want in zip(b(tokens()), root.single_transformer_blocks[0](tokens()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("permutation", [None, free(K), in_windows(K)], ids=["plain", "free", "windows"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_compiled_block_selects_once(permutation: Tensor | None, dynamic: bool) -> None:
    b = block()
    for layer in layers(b):
        layer.set_compensation(layer.comp_down, layer.comp_up, permutation=permutation)
    torch._dynamo.reset()
    compiled = torch.compile(b, fullgraph=True, dynamic=dynamic)
    with torch._inductor.config.patch(fx_graph_cache=False):
        outputs, code = run_and_get_code(compiled, tokens())
    assert code[0].count("rtlynx_into.sparsify_cpu(") == 1
    assert code[0].count("rtlynx_into.sparse_linear_cpu(") == 4
    for got, want in zip(outputs, b(tokens()), strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_a_compiled_block_that_writes_to_its_input_selects_twice() -> None:
    b = block()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        q = b.attn.to_q(x)
        x.add_(1)
        return q, b.attn.to_k(x)

    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        outputs, code = run_and_get_code(torch.compile(run, fullgraph=True), tokens())
    assert code[0].count("rtlynx_into.sparsify_cpu(") == 2
    for got, want in zip(outputs, run(tokens()), strict=True):
        torch.testing.assert_close(got, want)


# ---- not sharing ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_do_not_share_hold_nothing_in_common() -> None:
    root = model()
    x = torch.randn(8, K)
    want = [layer(x) for layer in layers(root)]
    assert len({id(layer.comp_down) for layer in layers(root)}) < len(layers(root))
    rtlynx.apply(root, SparsityConfig(rank=RANK, share_inputs=False))
    assert len({id(layer.comp_down) for layer in layers(root)}) == len(layers(root))
    assert all(layer.input_group is None and isinstance(layer.comp_down, nn.Parameter) for layer in layers(root))
    for layer, before in zip(layers(root), want, strict=True):
        assert torch.equal(layer(x), before)


def test_layers_that_no_longer_share_score_by_their_own_weights() -> None:
    root = model(SparsityConfig(rank=RANK, selection="weight"))
    rtlynx.apply(root, SparsityConfig(rank=RANK, selection="weight", share_inputs=False))
    for layer in layers(root):
        torch.testing.assert_close(layer.score, layer.weight.detach().norm(dim=0))


class Hook:
    """As diffusers' group offloading leaves it on a layer."""

    def __init__(self, stream: object) -> None:
        self.group = self
        self.stream = stream

    def get_hook(self, name: str) -> Hook | None:
        return self if name == "group_offloading" else None


@torch.no_grad()
def test_single_layers_moved_ahead_of_time_are_refused_where_they_share() -> None:
    root = model()
    q, x = layers(root)[0], torch.randn(8, K)
    q._diffusers_hook = Hook(stream=None)  # type: ignore[assignment]
    q(x)
    q._diffusers_hook = Hook(stream=object())  # type: ignore[assignment]
    with pytest.raises(rtlynx.InvalidArgumentError, match="share_inputs=False"):
        q(x)
