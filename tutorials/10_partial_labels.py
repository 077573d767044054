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
# # 10. Partial labels
#
# Tasks rarely have labels for the same people. A missing label is NaN (or -100 for integers): it is in no loss, rate or metric, and its
# row still trains the other tasks. Groups may be missing, too (-1).

# %%
import os

import matplotlib.pyplot as plt
import torch

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS = (3, 4000) if SMOKE else (10, None)
torch.set_num_threads(1)
data = lf.load_dataset("adult", ["income", "never_married", "long_hours"], sensitive=("sex",), subset=ROWS)

# %% [markdown]
# ## Take labels away
#
# Only a share of the people has a known income; every fifth has no known sex.


# %%
def loader(share):
    """Return a training loader in which a share of the incomes is known."""
    draw = torch.Generator().manual_seed(0)
    labels = {name: values.clone() for name, values in data.train.labels.items()}
    labels["income"][torch.rand(len(data.train.x), generator=draw) >= share] = torch.nan
    sex = data.train.groups["sex"].clone()
    sex[torch.rand(len(sex), generator=draw) < 0.2] = -1
    return lf.ResidentLoader(
        data.train.x, labels, {"sex": sex}, batch_size=256, shuffle=True, seed=0, group_names=data.groups
    )


def train(share, weighting, **settings):
    """Return the test predictions."""
    trainer = lf.FairTrainer(
        lf.task_dict(data.tasks), weighting, "HPS", lambda: MLP(data.n_features, (32,)), linear_heads(data.tasks, 32), False, False,
        {"optim": "adam", "lr": 3e-3}, None, weight_args=settings, seed=0, progress=False, select="last",
    )  # fmt: skip
    trainer.train(loader(share), epochs=EPOCHS, val_dataloaders=data.val.loader(4096))
    return trainer.predict(data.test.loader(4096))


# %% [markdown]
# ## What the other tasks carry over
#
# With few incomes known, the encoder is trained by the other tasks.

# %%
shares = [0.05, 0.3, 1.0]
auc = {
    name: [
        lf.metrics.auc_score(p.scores["income"], p.labels["income"]) for p in (train(share, *how) for share in shares)
    ]
    for name, how in {"plain": ("EW",), "GradNorm": ("GradNorm",)}.items()
}
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for (name, values), style in zip(auc.items(), ("o-", "s--")):
    axes.plot(shares, values, style, label=name)
axes.set(xlabel="share of incomes known", ylabel="AUC of income", xscale="log")
_ = axes.legend()

# %% [markdown]
# ## Fairness with a fifth of the groups unknown
#
# Rates are of the people whose label and group are known. The table counts the others.

# %%
for name, predictions in {"plain": train(0.3, "EW"), "FairMT": train(0.3, "FairMT", target="eo <= 0.05")}.items():
    frame = lf.metrics.metric_frame(predictions, "income", sensitive=["sex"])
    print(name, frame.by_group.round(3).to_string(), sep="\n")

# %% [markdown]
# In recipes: `data.label_fraction: 0.3` takes labels away at random, task by task; in tables a missing label is an empty cell.
