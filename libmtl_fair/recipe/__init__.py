"""Recipes: a YAML file becomes a validated, frozen object."""

from libmtl_fair.recipe.schema import Recipe, check_names, load_recipe
from libmtl_fair.recipe.sections import Optimizer

__all__ = ["Optimizer", "Recipe", "check_names", "load_recipe"]
