"""Recipes say which layers of a model become sparse when the configuration does not. A new model family is one more data file."""

from __future__ import annotations

from torch import nn

from rtlynx.recipes.aura_flow import AURA_FLOW
from rtlynx.recipes.cogvideox import COGVIDEOX
from rtlynx.recipes.flux import FLUX
from rtlynx.recipes.flux2 import FLUX2
from rtlynx.recipes.flux3 import FLUX3
from rtlynx.recipes.generic import GENERIC
from rtlynx.recipes.hidream import HIDREAM
from rtlynx.recipes.hunyuan_video import HUNYUAN_VIDEO
from rtlynx.recipes.krea2 import KREA2
from rtlynx.recipes.ltx import LTX, LTX2
from rtlynx.recipes.lumina2 import LUMINA2
from rtlynx.recipes.pixart import PIXART
from rtlynx.recipes.qwen_image import QWEN_IMAGE, QWEN_IMAGE_21
from rtlynx.recipes.recipe import Clock, Recipe
from rtlynx.recipes.sana import SANA
from rtlynx.recipes.sd3 import SD3
from rtlynx.recipes.wan import WAN
from rtlynx.recipes.z_image import Z_IMAGE

__all__ = [
    "AURA_FLOW",
    "COGVIDEOX",
    "FLUX",
    "FLUX2",
    "FLUX3",
    "GENERIC",
    "HIDREAM",
    "HUNYUAN_VIDEO",
    "KREA2",
    "LTX",
    "LTX2",
    "LUMINA2",
    "PIXART",
    "QWEN_IMAGE",
    "QWEN_IMAGE_21",
    "RECIPES",
    "SANA",
    "SD3",
    "WAN",
    "Z_IMAGE",
    "Clock",
    "Recipe",
    "find_recipe",
]

RECIPES = (
    AURA_FLOW,
    COGVIDEOX,
    FLUX,
    FLUX2,
    FLUX3,
    HIDREAM,
    HUNYUAN_VIDEO,
    KREA2,
    LTX,
    LTX2,
    LUMINA2,
    PIXART,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    SANA,
    SD3,
    WAN,
    Z_IMAGE,
)


def find_recipe(module: nn.Module) -> Recipe:
    """The recipe of the module's class or of the nearest base class that has one; `GENERIC` when there is none.

    Classes are compared by name: diffusers need not be installed, and a copied model file is served like the original.
    """
    for cls in type(module).__mro__:
        for recipe in RECIPES:
            if cls.__name__ in recipe.classes:
                return recipe
    return GENERIC
