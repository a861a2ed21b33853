"""The recipes of all families: every linear layer of full-size models, and small models that run."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import rtlynx
from full_size_models import CASES
from pinned_layers import FOLDER, Layer, changes, folded, found, pinned, unfolded
from rtlynx import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipes import GENERIC, find_recipe
from rtlynx.reference import K_MULTIPLE, N_MULTIPLE
from rtlynx.sharing import InputGroup
from tiny_families import FAMILIES, WITHOUT_RECIPE
from tiny_models import NEIGHBOURS, TINY, Tiny, output, relative_error


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")  # diffusers' own, in Chroma
@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_full_size_models(name: str) -> None:
    case = CASES[name]
    model = case.on_meta()
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    recipe, summary = find_recipe(model), rtlynx.summary(rtlynx.apply(model))
    assert recipe.name == case.recipe
    assert sorted(pinned(name)) == sorted(found(summary)), changes(name, found(summary))
    assert [row.name for row in summary] == linear
    assert summary.sparse_flops_share > 0.96  # Chroma has its guidance, PixArt is small
    for skip in recipe.paper_skip:
        assert any(first_match(row.name, [skip]) for row in summary if row.sparse), f"{skip} names no sparse layer"


def test_every_full_size_model_has_its_file() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.txt" for name in CASES}


def test_a_line_stands_for_blocks_that_are_alike_and_follow_each_other() -> None:
    layers = [Layer(f"blocks.{i}.ff.net.2", 64, 64 if i < 3 else 128, "") for i in (0, 1, 2, 3, 5, 6)]
    layers.insert(1, Layer("blocks.0.norm", 64, 8, "one row"))
    lines = folded(layers)
    assert lines == [
        "sparse    64 → 64     blocks.{0..2}.ff.net.2",
        "dense     64 → 8      blocks.0.norm: one row",
        "sparse    64 → 128    blocks.3.ff.net.2",
        "sparse    64 → 128    blocks.{5..6}.ff.net.2",
    ]
    assert sorted(unfolded(lines)) == sorted(layers)


def test_generic_patterns_find_what_the_recipes_find() -> None:
    sparse = {layer.name for name in CASES for layer in pinned(name) if not layer.why_dense}
    assert not [name for name in sparse if not first_match(name, GENERIC.include)]


OTHERS = NEIGHBOURS | FAMILIES | WITHOUT_RECIPE
EVERYONE = TINY | NEIGHBOURS | FAMILIES


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of Kandinsky 5's norms
@pytest.mark.parametrize("tiny", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tiny: Tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny.build("cpu", dtype), tiny.inputs("cpu", dtype)
    want = output(model, inputs)
    keys = list(model.state_dict())
    rtlynx.apply(model)
    assert sum(row.sparse for row in rtlynx.summary(model)) == tiny.sparse_layers
    assert list(model.state_dict()) == keys
    # What the kernels ask of a layer: these models are run on GPUs too.
    assert all(m.in_features % K_MULTIPLE == m.out_features % N_MULTIPLE == 0 for m in model.modules() if isinstance(m, SparseLinear))
    got = output(model, inputs)
    assert got.dtype == dtype and got.isfinite().all()
    assert 1e-3 < relative_error(got, want) < 0.5
    assert torch.equal(output(rtlynx.remove(model), inputs), want)


def test_qwen_image_edit_with_its_given_picture_at_time_zero() -> None:
    inputs = {**TINY["qwen_image"].inputs("cpu", torch.float32), "img_shapes": [[(1, 8, 4), (1, 8, 4)]] * 2}  # the new one, the given one
    plain = TINY["qwen_image"].build("cpu", torch.float32)
    torch.manual_seed(0)
    model = type(plain).from_config({**plain.config, "zero_cond_t": True}).eval()
    want = output(model, inputs)
    assert 1e-3 < relative_error(output(rtlynx.apply(model), inputs), want) < 0.5
    for layer in (m for m in model.modules() if isinstance(m, SparseLinear)):
        layer.dense = True
    torch.testing.assert_close(output(model, inputs), want)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("flux2", {"transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.attn.to_added_qkv"}),
        ("sd3", {"transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.attn.to_added_qkv"}),
        ("pixart", {"transformer_blocks.0.attn1.to_qkv", "transformer_blocks.0.attn2.to_kv"}),
        ("wan", {"blocks.0.attn1.to_qkv", "blocks.0.attn2.to_kv", "blocks.0.attn2.to_added_kv"}),
    ],
)
def test_fused_projections_are_served_when_fused_first(name: str, fused: set[str]) -> None:
    tiny = NEIGHBOURS[name]
    model, inputs = tiny.build("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    if name == "sd3":  # diffusers 0.42 cannot run a fused second attention
        torch.manual_seed(0)
        model = type(model).from_config({**model.config, "dual_attention_layers": ()}).eval()
    want = output(model, inputs)
    with torch.no_grad():
        model.fuse_qkv_projections()
    assert fused <= {row.name for row in rtlynx.summary(rtlynx.apply(model)) if row.sparse}
    assert fused <= set(_inputs(model, inputs))
    assert 1e-3 < relative_error(output(model, inputs), want) < 0.5


@pytest.mark.parametrize("tiny", EVERYONE.values(), ids=EVERYONE.keys())
def test_the_layers_said_to_share_their_input_are_those_that_do(tiny: Tiny) -> None:
    """One and the same tensor, not an equal copy: watched while the model runs."""
    model, inputs = rtlynx.apply(tiny.build("cpu", torch.float32)), tiny.inputs("cpu", torch.float32)
    sparse = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    read: dict[tuple[str, int, torch.Size], set[str]] = {}
    seen = _inputs(model, inputs)  # holds the tensors: a freed one's address would come again
    for name in sparse:
        block = re.match(r".*?\.\d+\.", name)
        assert block is not None, f"{name} is not in a block"
        read.setdefault((block[0], seen[name].data_ptr(), seen[name].shape), set()).add(name)
    said: dict[InputGroup | None, set[str]] = {}
    for name, layer in sparse.items():
        said.setdefault(layer.input_group, set()).add(name)
    alone = said.pop(None, set())
    assert sorted(map(sorted, said.values())) == sorted(sorted(names) for names in read.values() if len(names) > 1)
    assert alone.isdisjoint(set().union(*said.values()))
    for member in {member for group in find_recipe(model).shared_inputs for member in group}:
        assert any(name.endswith(f".{member}") for name in sparse), f"{member} names no sparse layer"


def _inputs(model: nn.Module, inputs: dict[str, object]) -> dict[str, Tensor]:
    """Name → input of every linear layer that runs in one forward, all kept alive so that addresses tell them apart."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return module.register_forward_pre_hook(hook)

    hooks = [watch(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    output(model, inputs)
    for handle in hooks:
        handle.remove()
    return seen
