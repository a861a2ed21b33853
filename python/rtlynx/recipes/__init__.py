"""Recipes say which layers of a model become sparse when the configuration does not. A new model family is one more data file."""

from __future__ import annotations

from torch import nn

from rtlynx.recipes.flux import FLUX
from rtlynx.recipes.generic import GENERIC
from rtlynx.recipes.qwen_image import QWEN_IMAGE
from rtlynx.recipes.recipe import Recipe
from rtlynx.recipes.z_image import Z_IMAGE

__all__ = ["FLUX", "GENERIC", "QWEN_IMAGE", "RECIPES", "Z_IMAGE", "Recipe", "find_recipe"]

RECIPES = (FLUX, QWEN_IMAGE, Z_IMAGE)


def find_recipe(module: nn.Module) -> Recipe:
    """The recipe of the module's class or of the nearest base class that has one; `GENERIC` when there is none.

    Classes are compared by name: diffusers need not be installed, and a copied model file is served like the original.
    """
    for cls in type(module).__mro__:
        for recipe in RECIPES:
            if cls.__name__ in recipe.classes:
                return recipe
    return GENERIC
