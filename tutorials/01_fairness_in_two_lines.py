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
# # 1. Add fairness to an existing LibMTL script in two lines
#
# A LibMTL script has a `task_dict` with losses and metrics of its own, an encoder, decoders, loaders and a `Trainer`.
# All of it stays. Two lines change:
#
# ```diff
# + import libmtl_fair as lf
# - class MyTrainer(LibMTL.Trainer):
# + class MyTrainer(lf.FairTrainer):
# ```
#
# and the name of the weighting, which is an argument that LibMTL has anyway.

# %%
import os

import torch
from torch import nn

import libmtl_fair as lf  # line 1: loads LibMTL (on today's PyTorch, with or without a GPU) and registers the methods

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS = (2, 1500) if SMOKE else (10, None)
torch.set_num_threads(1)

# %% [markdown]
# ## The script as it was
#
# The data: census records, three yes/no tasks on one input. Any loader of `(x, labels)` does; this one also puts the
# groups under `labels["sensitive"]`, a key that LibMTL ignores and methods that compare groups read.

# %%
data = lf.load_dataset("adult", ["income", "never_married", "long_hours"], sensitive=("sex", "race"), subset=ROWS)
train_loader = data.train.loader(512, shuffle=True, seed=0)
val_loader, test_loader = data.val.loader(4096), data.test.loader(4096)

# %% [markdown]
# Losses and metrics are LibMTL's own kind of classes:

# %%
from LibMTL.loss import AbsLoss
from LibMTL.metrics import AbsMetric


class YesNoLoss(AbsLoss):
    def __init__(self):
        super().__init__()
        self.loss_fn = nn.BCEWithLogitsLoss()

    def compute_loss(self, pred, gt):
        return self.loss_fn(pred.squeeze(1), gt)


class Accuracy(AbsMetric):
    def update_fun(self, pred, gt):
        self.record.append(((pred.squeeze(1) > 0) == (gt > 0.5)).sum().item())
        self.bs.append(len(gt))

    def score_fun(self):
        return [sum(self.record) / sum(self.bs)]


task_dict = {
    name: {"metrics": ["Acc"], "metrics_fn": Accuracy(), "loss_fn": YesNoLoss(), "weight": [1]}
    for name in data.task_names
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(data.n_features, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


# %% [markdown]
# ## With the second line


# %%
class MyTrainer(lf.FairTrainer):  # line 2; was: LibMTL.Trainer
    def process_preds(self, preds, task_name=None):
        return preds


def train(weighting, **weight_args):
    trainer = MyTrainer(
        task_dict=task_dict,
        weighting=weighting,
        architecture="HPS",
        encoder_class=Encoder,
        decoders=nn.ModuleDict({name: nn.Linear(64, 1) for name in task_dict}),
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "adam", "lr": 2e-3, "weight_decay": 1e-5},
        scheduler_param=None,
        weight_args=weight_args,
        seed=0,
        progress=False,
        select="last",
    )
    trainer.train(train_loader, test_loader, EPOCHS, val_dataloaders=val_loader)
    return trainer


trainers = {
    "EW (plain)": train("EW"),
    "ReLiF": train("ReLiF", beta=0.3, target=0.04, lambda_0=3.0, lambda_max=3.0),
    "FairMT": train("FairMT"),
}

# %% [markdown]
# ## What it did
#
# *Bias* is the individual audit: how far the scores of different tasks lie apart beyond a fixed tolerance.
# *Equalised odds* compares the error rates of groups; 0 is equal. One seed is not evidence: tutorial 3 has several.

# %%
import pandas as pd

rows = {}
for name, trainer in trainers.items():
    predictions = trainer.predict(test_loader)
    groups = lf.metrics.GroupMetrics(
        list(predictions.tasks),
        {a: len(names) for a, names in data.groups.items()},
        group_names=data.groups,
        n_bootstrap=200,
    )
    table = groups.update(predictions.outputs, predictions.labels, predictions.groups).compute()
    odds = table[
        (table["metric"] == "equalized_odds") & (table["group"] == "difference") & (table["attribute"] == "sex")
    ]
    utility = lf.metrics.utility(predictions)["macro"]
    bias = trainer.audit(test_loader, delta=0.275).bias
    rows[name] = {**utility, "Bias@0.275": bias, "equalised odds, sex": odds["value"].mean()}
print(pd.DataFrame(rows).T.round(3).to_string())

# %% [markdown]
# Everything that happened is in `trainer.history`, one row a step: the controller's weight, the violation rate, losses.

# %%
print(trainers["ReLiF"].history[["step", "loss/income", "lambda", "r_smooth"]].tail(3).round(4).to_string())

# %% [markdown]
# The command `libmtl-fair exec SCRIPT.py -- --weighting ReLiF` runs a whole LibMTL script without any change.
