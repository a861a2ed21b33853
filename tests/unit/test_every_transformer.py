"""Every transformer that the installed diffusers has, full size and without memory: what `apply` does to it, and that `remove` undoes it.

It has to pass with every diffusers from 0.35 on.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers.models.transformers
import pytest
import torch
from diffusers import ModelMixin
from torch import nn

import rtlynx
from rtlynx.patterns import first_match
from rtlynx.recipes import find_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")  # diffusers' own, in Chroma
CLASSES = {name: cls for name, cls in vars(diffusers.models.transformers).items() if inspect.isclass(cls) and issubclass(cls, ModelMixin)}
CONFIGS: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 320},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096]},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "caption_channels": 4096,
        "num_layers": 28,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 320, "use_linear_projection": True},
    "TransformerTemporalModel": {"in_channels": 320},
}
"""What is missing where the class's own defaults make no model."""
LITTLE_SPARSE = {
    "NucleusMoEImageTransformer2DModel": "the text's projection in every block; its experts are no linear layers at all",
    "RFD4ProteinaTransformer": "for proteins: pairs of residues, under names of its own",
    "SanaWMTransformer3DModel": "a second attention, to the camera, and gates under names of its own",
    "T5FilmDecoder": "for spectrograms: a feed-forward named as in T5",
}
"""Models of which a tenth of the linear layers' FLOPs or more stays dense, and why."""


@functools.cache
def built(name: str) -> nn.Module | str:
    """The model on the meta device, or why it cannot be built."""
    try:
        with torch.device("meta"):
            model = CLASSES[name](**CONFIGS.get(name, {}))
    except Exception as error:  # whatever a class says to a configuration that it does not take
        return f"{type(error).__name__}: {error}"
    assert isinstance(model, nn.Module)
    return model


def test_most_can_be_built() -> None:
    why = {name: model for name in CLASSES if isinstance(model := built(name), str)}
    assert len(CLASSES) >= 33
    assert len(why) <= 5, why


@pytest.mark.parametrize("name", CLASSES)
def test_apply_and_remove(name: str) -> None:
    model = built(name)
    if isinstance(model, str):
        pytest.skip(f"its configuration has no defaults: {model}")
    before = {path: (layer, layer.weight, layer.bias) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    summary, recipe = rtlynx.summary(rtlynx.apply(model)), find_recipe(model)
    try:
        assert [row.name for row in summary] == list(before)
        assert all(row.sparse != bool(row.reason) for row in summary)
        sparse = [row.name for row in summary if row.sparse]
        assert sparse
        assert [path for path in sparse if not _in_repeated_block(model, path)] == []
        assert [path for path in sparse if first_match(path, (*recipe.per_sample, *recipe.ends))] == []
        assert (summary.sparse_flops_share > 0.9) != (name in LITTLE_SPARSE), str(summary)
    finally:
        rtlynx.remove(model)
    after = {path: (layer, layer.weight, layer.bias) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert list(after) == list(before)
    for path, (layer, weight, bias) in before.items():
        assert type(after[path][0]) is type(layer) and after[path][1] is weight and after[path][2] is bias, path


def _in_repeated_block(model: nn.Module, path: str) -> bool:
    """Whether a layer is somewhere in one of a list of modules of one class."""
    parts = path.split(".")
    lists = (model.get_submodule(".".join(parts[:i])) for i, part in enumerate(parts[:-1]) if part.isdigit())
    return any(len({type(block) for block in blocks}) == 1 for blocks in lists if isinstance(blocks, nn.ModuleList))
