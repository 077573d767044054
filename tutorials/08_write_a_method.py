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
# # 8. Write a method
#
# A method that adds a term is one class: settings, declared once, and the term. Base weightings, `rep_grad`, the history, recipes, studies
# and stacked trials follow. CONTRIBUTING.md has the details; here one is written, checked and compared.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.batch import FairBatch
from libmtl_fair.methods.base import Penalty, Settings, setting
from libmtl_fair.models import MLP, linear_heads

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS = (6, 3000) if SMOKE else (10, None)
torch.set_num_threads(1)

# %% [markdown]
# ## The method
#
# Mean scores of the groups of an attribute are to be equal. `F.group_mean` takes means by group; -1 is nobody's group.


# %%
class MeanGapSettings(Settings):
    """Hyperparameters of MeanGap."""

    strength: float = setting(1.0, "weight of the gap", ours=True, ge=0, search=(0.05, 5.0, "log"))


class MeanGap(Penalty):
    """Sum over tasks and attributes of the squared distance of the groups' mean scores from their mean. Source: this page."""

    settings_class = MeanGapSettings
    needs_groups = True
    settings: MeanGapSettings

    def penalty(self, batch: FairBatch) -> Tensor | None:
        """Return the term, attached to the graph."""
        gaps = []
        for attribute, ids in batch.groups.items():
            for scores in batch.scores.values():
                mean, count = lf.functional.group_mean(scores, ids, batch.n_groups[attribute])
                present = (count > 0).to(mean.dtype)
                centre = (mean * present).sum() / present.sum().clamp(min=1)
                gaps.append(((mean - centre).square() * present).sum())
        total = torch.stack(gaps).sum()
        self.trace = {"gap": total.detach()}
        return self.settings.strength * total


# %% [markdown]
# A wrong setting is refused in words, without another line:

# %%
try:
    MeanGapSettings(strength=-1.0)
except lf.errors.RecipeError as error:
    print(error)

# %% [markdown]
# ## Train it beside plain

# %%
data = lf.load_dataset("adult", ["income", "long_hours"], sensitive=("sex",), subset=ROWS)


def train(weighting, **settings):
    """Return a trained trainer."""
    trainer = lf.FairTrainer(
        lf.task_dict(data.tasks), weighting, "HPS", lambda: MLP(data.n_features, (32,)), linear_heads(data.tasks, 32), False, False,
        {"optim": "adam", "lr": 5e-3}, None, weight_args=settings, seed=0, progress=False, select="last",
    )  # fmt: skip
    trainer.train(data.train.loader(256, shuffle=True, seed=0), epochs=EPOCHS, val_dataloaders=data.val.loader(4096))
    return trainer


trainers = {
    "plain": train(MeanGap, strength=0.0),
    "weak": train(MeanGap, strength=1.0),
    "strong": train(MeanGap, strength=10.0),
}
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for name, trainer in trainers.items():
    axes.plot(trainer.history["gap"].rolling(5).mean(), label=name)
axes.set(xlabel="step", ylabel="squared gap of mean scores")
_ = axes.legend()

# %% [markdown]
# ## What came of it
#
# A smaller gap of mean scores is not yet a smaller gap of decisions, and may be levelling down: look at both groups.

# %%
for name, trainer in trainers.items():
    found = trainer.predict(data.test.loader(4096))
    frame = lf.metrics.metric_frame(found, "income", sensitive=["sex"])
    print(name, frame.by_group.round(3).to_string(), sep="\n")

# %% [markdown]
# In a recipe: `{weighting: "my_module:MeanGap", strength: 1.0}`; `libmtl-fair tune` searches the range that `search` declares.
