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
# # 4. From a question to a retrained model
#
# *What is the best macro AUC on adult if equalised odds between the sexes may differ by at most 0.05?*
#
# A study tries settings of one method, trains each, and looks at validation data only. The unregularised model, the
# setting in the recipe and the published defaults are always among its trials.

# %%
import os
import tempfile
from pathlib import Path

import torch
from rich import print as show

from libmtl_fair import tune
from libmtl_fair.recipe import Recipe, load_recipe
from libmtl_fair.tune.results import agreement_table, trials_table
from libmtl_fair.tune.selection import explain

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
TRIALS, EPOCHS, ROWS = (6, 1, 4000) if SMOKE else (40, 8, None)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The question, as a recipe
#
# `objectives` are what to trade off; `space` may be left out: every method has built-in ranges.

# %%
recipe = Recipe.from_dict(
    {
        "name": "question",
        "data": {"name": "adult", "tasks": ["income", "never_married"], "sensitive": ["sex"], "subset": ROWS},
        "model": {"hidden": [64, 32]},
        "train": {"epochs": EPOCHS, "select": "last", "optimizer": {"optim": "adam", "lr": 0.002}},
        "seeds": [0, 1] if SMOKE else [0, 1, 2],
        "methods": {"plain": {"weighting": "EW"}, "fairmt": {"weighting": "FairMT"}},
        "metrics": {"n_bootstrap": 50},
        "tune": {"objectives": ["macro_auc", "income/eo_difference"], "trials": TRIALS},
    }
)

# %% [markdown]
# ## The study
#
# `n_trials` is a total: run this cell again and nothing happens; raise the number and it goes on. A recipe that has changed in
# the meantime is refused, with the difference shown.

# %%
study = tune.tune(recipe, TRIALS, storage=folder / "study.journal")
front, feasible = tune.front(study)
table = trials_table(study).set_index("number").loc[[trial.number for trial in front]]
print(table[["role", "macro_auc", "income/eo_difference", "lr", "target"]].round(4).fillna({"role": ""}).to_string())

# %% [markdown]
# ## The answer
#
# `select` takes the best utility of the trials whose disparity is within the bound even at the upper end of its interval;
# `knee` takes the point after which fairness becomes expensive. Both refuse trials that lose AUC or accuracy of a task beyond
# noise, and models that decide the same for everybody. Where nothing is left they take what misses least, and `explain` says so.

# %%
chosen = tune.select(study, max_disparity=0.05)
print("chosen:", chosen.number, "knee:", tune.knee(study).number)
print(*explain(study, chosen, "max_disparity=0.05"), sep="\n")

# %% [markdown]
# ## The model
#
# A trial gives a recipe, and a recipe gives a run: the chosen setting beside the plain model, over the recipe's seeds. The
# study used the first of them, and there the run gives the study's validation numbers. What held on validation should hold
# on test: the last column says by how much it differs, and by how much
# it would if other people had been drawn.

# %%
from libmtl_fair.recipe.run import run_recipe

best = tune.to_recipe(chosen, recipe)
(folder / "best.yaml").write_text(best.to_yaml())
run = run_recipe(load_recipe(folder / "best.yaml"), folder / "run", device="cpu")
show(agreement_table(run))

# %% [markdown]
# The same from the shell:
#
# ```
# libmtl-fair tune question.yaml --select max_disparity=0.05 --out runs/question --stacked 8
# libmtl-fair run --from-study runs/question/study.journal --trial 12
# libmtl-fair dashboard runs/question
# ```
