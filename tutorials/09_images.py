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
# # 9. Images
#
# Any encoder will do: here a small convolutional network on pictures of digits (scikit-learn's), two tasks, and a group that is painted
# into the picture: a bright corner, on most pictures of large digits. A model can use the corner in place of the digit.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import libmtl_fair as lf

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS = 6 if SMOKE else 30
torch.set_num_threads(1)

# %%
rng = np.random.default_rng(0)
pictures, digit = load_digits(return_X_y=True)
pictures = (pictures / 16 + rng.normal(0, 0.5, pictures.shape)).reshape(-1, 1, 8, 8).astype("float32")
large = digit >= 5
corner = np.where(rng.random(len(digit)) < 0.8, large, ~large)  # the group: four of five large digits have it
pictures[corner, 0, :2, :2] += 1.5
figure, panels = plt.subplots(1, 6, figsize=(6.4, 1.5), layout="constrained")
for panel, i in zip(panels, range(6)):
    panel.imshow(pictures[i, 0], cmap="gray")
    panel.set_title(f"{digit[i]}, {'corner' if corner[i] else 'none'}", fontsize=8)
    panel.set_axis_off()

# %% [markdown]
# ## Loaders
#
# `ResidentLoader` takes tensors of any shape. `labels["sensitive"]` of every batch holds the groups.

# %%
rows = rng.permutation(len(digit))
parts = dict(zip(("train", "val", "test"), np.split(rows, [1000, 1300])))


def loader(part, shuffle=False):
    """Return the loader of one part."""
    at = parts[part]
    labels = {"large": torch.tensor(large[at]).float(), "even": torch.tensor(digit[at] % 2 == 0).float()}
    return lf.ResidentLoader(
        torch.tensor(pictures[at]), labels, {"corner": torch.tensor(corner[at]).long()}, batch_size=100, shuffle=shuffle, seed=0,
        group_names={"corner": ["none", "corner"]}, device="cpu",
    )  # fmt: skip


tasks = (lf.Binary("large"), lf.Binary("even"))


def train(weighting, **settings):
    """Return the test predictions of a trained network."""
    torch.manual_seed(0)
    heads = nn.ModuleDict({task.name: nn.Linear(64, 1) for task in tasks})

    def encoder():
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU()
        )

    trainer = lf.FairTrainer(
        lf.task_dict(tasks), weighting, "HPS", encoder, heads, False, False, {"optim": "adam", "lr": 3e-3}, None,
        weight_args=settings, seed=0, progress=False, select="last", device="cpu",
    )  # fmt: skip
    trainer.train(loader("train", shuffle=True), epochs=EPOCHS, val_dataloaders=loader("val"))
    return trainer.predict(loader("test"))


# %% [markdown]
# ## Plain training uses the corner; a regulariser less
#
# Among pictures of large digits: how often are those with and without the corner called large?

# %%
found = {"plain": train("EW"), "regulariser": train("GroupRegulariser", loss="gap", lam=0.9)}
for name, predictions in found.items():
    frame = lf.metrics.metric_frame(predictions, "large", sensitive=["corner"])
    print(name, frame.by_group.round(3).to_string(), sep="\n")

# %% [markdown]
# For ReLiF's near pairs, who is alike must be told: give the loader `reference=`, the embeddings [N, r] of a frozen model that saw
# no sensitive attribute. Pictures from disk come by any loader of yours that adds `labels["sensitive"]`.
