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
# # 6. A table of your own, end to end
#
# From a CSV file to a report, a decision, and predictions for people who were not in it.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import SVG, display

import libmtl_fair as lf
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import plots_of, read_run
from libmtl_fair.report.findings import headline

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
ROWS, EPOCHS, SEEDS = (3000, 4, [0]) if SMOKE else (20000, 15, [0, 1, 2])
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The table
#
# Applicants, whether they repaid, and how much they earn. Here it is made up, with an unfairness put in: men have longer contracts for
# the same merit. Some incomes are not known.

# %%
rng = np.random.default_rng(0)
sex, age = rng.choice(["f", "m"], ROWS), rng.integers(20, 70, ROWS)
merit, years = rng.normal(size=ROWS), rng.poisson(3, ROWS)
repaid = merit + 0.15 * years + 0.8 * (sex == "m") + rng.logistic(size=ROWS) > 1.2
income = np.round(30000 + 8000 * merit + 400 * age + rng.normal(0, 4000, ROWS))
table = pd.DataFrame(
    {"sex": sex, "age": age, "score": merit.round(2), "years": years, "repaid": np.where(repaid, "yes", "no")}
)
table["income"] = np.where(rng.random(ROWS) < 0.2, np.nan, income)
table.to_csv(folder / "applicants.csv", index=False)
table.head(3)

# %% [markdown]
# ## The recipe
#
# `libmtl-fair init applicants.csv` proposes one; this is it in short. `libmtl-fair check` reads everything and trains nothing.

# %%
(folder / "applicants.yaml").write_text(f"""\
name: applicants
data:
  table: applicants.csv
  tasks: {{repaid: {{kind: binary, positive: "yes"}}, income: {{kind: regression}}}}
  sensitive: {{sex: {{column: sex}}, age: {{column: age, bins: [30, 50], labels: [young, middle, old]}}}}
train: {{epochs: {EPOCHS}, batch_size: 128, optimizer: {{lr: 0.005}}}}
seeds: {SEEDS}
metrics: {{n_bootstrap: 100}}
methods:
  plain: {{weighting: EW}}
  fairmt: {{weighting: FairMT, constraint: "eo <= 0.05"}}
  offsets: {{post: offsets, attribute: sex}}
""")
run = run_recipe(load_recipe(folder / "applicants.yaml"), folder / "run", device="cpu")

# %% [markdown]
# ## What was found

# %%
found = read_run(run)
for about, text in headline(found):
    print(f"{about}. {text}\n")

# %%
picture = next(plot for plot in plots_of(found) if plot.section == "first")
display(SVG(picture.svg().replace("var(--ink)", "#1b1b1f").replace("var(--grid)", "#d8d8de")))

# %% [markdown]
# ## In use
#
# New rows have the inputs, and nothing else is needed: no labels, and no attribute that the model does not read. `predict` answers in the
# table's own units; `decide` takes the thresholds in use.

# %%
model = lf.load(run, method="fairmt", seed=SEEDS[0])
new = table.drop(columns=["repaid", "income"]).head(5)
print(model.predict(new).round(3).to_string())

# %% [markdown]
# The same in the shell:
#
# ```
# libmtl-fair predict runs/applicants new.csv --method fairmt --out predictions.parquet
# libmtl-fair export runs/applicants --format onnx
# ```
#
# A table that lacks a column is refused, with its name:

# %%
try:
    model.predict(new.drop(columns="score"))
except lf.errors.DataError as error:
    print(error)
