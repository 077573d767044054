"""Recipes: a YAML file becomes a validated, frozen object."""

from __future__ import annotations

from libmtl_fair.data.spec import SensitiveSpec, TaskSpec
from libmtl_fair.recipe.schema import Recipe, check_names, load_recipe
from libmtl_fair.recipe.sections import (
    Audit,
    Data,
    Heads,
    Method,
    Metrics,
    Model,
    Optimizer,
    Output,
    Scheduler,
    Train,
    Tune,
)

__all__ = [
    "Audit",
    "Data",
    "Heads",
    "Method",
    "Metrics",
    "Model",
    "Optimizer",
    "Output",
    "Recipe",
    "Scheduler",
    "SensitiveSpec",
    "TaskSpec",
    "Train",
    "Tune",
    "check_names",
    "load_recipe",
]
