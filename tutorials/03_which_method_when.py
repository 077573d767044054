# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Which method when: all methods on one data set
#
# | you want | take |
# |---|---|
# | like examples treated alike across tasks, no groups known | ReLiF |
# | equal error rates between groups, tasks of mixed kinds, missing labels | FairMT |
# | tasks that conflict, and a model that may branch | FairBranch with FBGrad |
# | a fairness head to balance with any LibMTL weighting | GLF or GLD heads with LambdaMix |
# | one simple penalty | GroupRegulariser (`dpl`, `fprl`, `tprl`, `bgl`) |
#
# The table is where to start; the numbers below are what they do *here*. This is one small data set with settings that
# were not tuned: it shows how to compare, and what an honest comparison states. For settings chosen on validation data
# see the recipes and `libmtl-fair tune`.

# %%
import os
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from libmtl_fair.libmtl import architecture_names, weighting_names
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import comparison_table, write_comparison
from libmtl_fair.report.compare import compare

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS, SEEDS = (1, 1200, [0, 1]) if SMOKE else (15, 12000, [0, 1, 2, 3, 4])
torch.set_num_threads(1)

# %% [markdown]
# One recipe, one entry a method. The first is the reference: differences refer to it, and the audit's tolerance comes
# from it. `alone` trains each task by itself: what sharing costs or gains is measured against it.

# %%
methods = {
    "plain": {"weighting": "EW"},
    "alone": {"weighting": "EW", "single_task": True},
    "relif": {"weighting": "ReLiF", "beta": 0.3, "target": 0.04, "lambda_0": 3.0, "lambda_max": 3.0},
    "fairmt": {"weighting": "FairMT"},
    "glf": {"weighting": "LambdaMix", "lam": 0.95, "heads": {"loss": "glf", "sensitive": ["sex"]}},
    "gld": {"weighting": "LambdaMix", "lam": 0.5, "heads": {"loss": "gld", "sensitive": ["sex"]}},
    "dpl": {"weighting": "GroupRegulariser", "loss": "dpl", "sensitive": ["sex"]},
    "fairbranch": {"weighting": "FBGrad", "architecture": "FairBranch"},
}
known = {*weighting_names(), *architecture_names()}
methods = {
    name: spec for name, spec in methods.items() if {spec["weighting"], spec.get("architecture", "HPS")} <= known
}

recipe = Recipe.from_dict(
    {
        "name": "which_method_when",
        "data": {
            "name": "adult",
            "tasks": ["income", "never_married", "long_hours"],
            "sensitive": ["sex"],
            "subset": ROWS,
        },
        "model": {"hidden": [64, 32]},
        "train": {"epochs": EPOCHS, "batch_size": 256, "select": "last"},
        "seeds": SEEDS,
        "methods": methods,
        "audit": {"delta": [0.275, "p75"]},
        "metrics": {"n_bootstrap": 200},
    }
)
folder = run_recipe(recipe, Path(tempfile.mkdtemp()) / "which", device="cpu")

# %% [markdown]
# ## The comparison
#
# Mean ± sd over seeds, the paired difference to the plain model and its bootstrap interval. An interval that holds 0 is
# no evidence of a difference.

# %%
found = compare([folder])
Console(width=110).print(comparison_table(found))

# %%
print(found.overview.round(2).to_string(index=False))

# %% [markdown]
# Ranks under each method's *own* thresholds (raw) against one fixed tolerance: they may disagree, which is why the fixed
# one is reported. `robust` says whether the order survives both methods' drift.

# %%
columns = ["delta_name", "method", "raw_bias", "rank_raw", "fixed_bias", "rank_fixed", "budget", "robust"]
print(found.drift[columns].round(4).to_string(index=False))

# %% [markdown]
# What sharing one model gains over one model a task: knowledge (up is better), discrimination by equal opportunity (EP) and
# equalised odds (EO; down is better).

# %%
means = found.gains[found.gains["task"] == "mean"]
print(means[["method", "knowledge", "ep", "eo"]].round(4).to_string(index=False))

# %% [markdown]
# What these numbers do not say:

# %%
for note in found.notes:
    print("-", note)
page, _ = write_comparison(found, folder)
print(page.name, f"{page.stat().st_size:,} bytes")
