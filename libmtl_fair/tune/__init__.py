"""Tuning with Optuna: from a question such as "at most 0.05 disparity" to a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libmtl_fair._imports import lazy

if TYPE_CHECKING:
    from libmtl_fair.tune.plan import study_recipe
    from libmtl_fair.tune.selection import chosen, front, knee, select, to_recipe, trial_by_number
    from libmtl_fair.tune.storage import open_storage
    from libmtl_fair.tune.study import tune

__all__ = ["chosen", "front", "knee", "open_storage", "select", "study_recipe", "to_recipe", "trial_by_number", "tune"]

_HOMES = {
    "tune.plan": "study_recipe",
    "tune.selection": "chosen front knee select to_recipe trial_by_number",
    "tune.storage": "open_storage",
    "tune.study": "tune",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
