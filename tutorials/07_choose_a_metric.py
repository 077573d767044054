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
# # 7. Choose a metric
#
# Selection rates, TPR, FPR, calibration, like people: no model satisfies all of them where base rates differ. Here is what each says of the
# same decisions, and a question that helps to choose.
#
# | ask | then |
# |---|---|
# | is the label itself the injustice? | selection rates (demographic parity): the label is not used |
# | does a wrong *no* hurt (a loan, a job, a treatment)? | TPR (equal opportunity) |
# | does a wrong *yes* hurt (an arrest, a fee)? | FPR |
# | both? | equalised odds |
# | is it a score that people read? | calibration, AUC by group |
# | may two like people get different answers? | inconsistency |

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS = (3, 4000) if SMOKE else (10, None)
torch.set_num_threads(1)

data = lf.load_dataset("adult", ["income"], sensitive=("sex",), subset=ROWS)
trainer = lf.FairTrainer(
    lf.task_dict(data.tasks), "EW", "HPS", lambda: MLP(data.n_features, (32,)), linear_heads(data.tasks, 32), False, False,
    {"optim": "adam", "lr": 5e-3}, None, seed=0, progress=False,
)  # fmt: skip
trainer.train(data.train.loader(256, shuffle=True, seed=0), epochs=EPOCHS, val_dataloaders=data.val.loader(4096))
predictions = trainer.predict(data.test.loader(4096))

# %% [markdown]
# ## One model, many answers

# %%
metrics = lf.metrics.GroupMetrics(predictions.tasks, {"sex": 2}, group_names=data.groups, n_bootstrap=200)
table = metrics.update(predictions.outputs, predictions.labels, predictions.groups).compute()
gaps = table[(table["group"] == "difference") & table["metric"].isin(
    ["demographic_parity", "equal_opportunity", "equalized_odds", "accuracy", "auc"])]  # fmt: skip
print(gaps[["metric", "value", "low", "high", "flag"]].round(3).to_string(index=False))

# %% [markdown]
# ## They move against each other
#
# One threshold for women, the other held at .5: where selection rates meet, error rates do not.

# %%
score, label = predictions.scores["income"].numpy(), predictions.labels["income"].numpy()
women = predictions.groups["sex"].numpy() == data.groups["sex"].index("Female")
thresholds = np.linspace(0.05, 0.6, 45)


def gap(counted):
    """Women minus men, of the share with a yes among those who are counted."""
    return [(score[women & counted] > t).mean() - (score[~women & counted] > 0.5).mean() for t in thresholds]


figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, counted, style in (("selection rate", label >= 0, "-"), ("TPR", label == 1, "--"), ("FPR", label == 0, ":")):
    axes.plot(thresholds, gap(counted), style, label=name)
axes.axhline(0, color="grey", linewidth=1)
axes.set(xlabel="threshold for women (men: 0.5)", ylabel="women minus men", title="no threshold makes all three equal")
_ = axes.legend()

# %% [markdown]
# ## Is there a gap at all?
#
# `judge` leaves groups out that have too few people, and says how often chance makes a gap as large.

# %%
counts = lf.metrics.counts_from_rows(table)
for metric in ("demographic_parity", "equal_opportunity"):
    verdict = lf.metrics.judge(counts, metric)
    print(metric, f"{verdict.value:.3f}", f"p = {verdict.p:.3f}")

# %% [markdown]
# The [glossary](../../metrics.md) has every measure with its undefined cases; [limits](../../limits.md) what none of them says.
