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
# # 2. Audit and report beside fairlearn
#
# A multi-task model has a table of predictions per task; fairlearn looks at one task at a time. Here is how the two meet.

# %%
import os
import tempfile
from pathlib import Path

import pandas as pd
import torch
from fairlearn.metrics import MetricFrame, selection_rate, true_positive_rate

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
EPOCHS, ROWS = (2, 1500) if SMOKE else (8, None)
torch.set_num_threads(1)

data = lf.load_dataset("adult", ["income", "long_hours"], sensitive=("sex", "race"), subset=ROWS)
trainer = lf.FairTrainer(
    lf.task_dict(data.tasks),
    "FairMT",
    "HPS",
    lambda: MLP(data.n_features, (64, 32)),
    linear_heads(data.tasks, 32),
    False,
    False,
    {"optim": "adam", "lr": 2e-3},
    None,
    seed=0,
    progress=False,
)
trainer.train(data.train.loader(512, shuffle=True, seed=0), epochs=EPOCHS, val_dataloaders=data.val.loader(4096))
predictions = trainer.predict(data.test.loader(4096))

# %% [markdown]
# ## A LibMTL model in a MetricFrame, in five lines

# %%
y_true, y_pred, y_score, sensitive = lf.metrics.to_fairlearn(predictions, "income")
frame = MetricFrame(
    metrics={"selection rate": selection_rate, "TPR": true_positive_rate},
    y_true=y_true, y_pred=y_pred, sensitive_features=sensitive["sex"],
)  # fmt: skip
print(frame.by_group.round(3).to_string())

# %% [markdown]
# or in one, with metrics that suit the kind of task, and intersections with their names:

# %%
print(lf.metrics.metric_frame(predictions, "income", sensitive=["sex", "race"]).by_group.round(3).to_string())

# %% [markdown]
# Rows with a missing label or an unknown group cannot go into fairlearn; their number is kept, not hidden:

# %%
print(sensitive.attrs["libmtl_fair_dropped"])

# %% [markdown]
# ## All tasks, attributes and intervals at once
#
# `GroupMetrics` gives the same numbers (to 1e-12) for every task and attribute in one pass, with a bootstrap interval for
# every difference and ratio, equalised odds included, and marks groups that are too small to say much.

# %%
metrics = lf.metrics.GroupMetrics(
    list(predictions.tasks), {a: len(names) for a, names in data.groups.items()}, group_names=data.groups
)
table = metrics.update(predictions.outputs, predictions.labels, predictions.groups).compute()
differences = table[(table["group"] == "difference") & table["metric"].isin(["equalized_odds", "demographic_parity"])]
print(differences[["task", "attribute", "metric", "value", "low", "high"]].round(3).to_string(index=False))

ours = table.query("task == 'income' and attribute == 'sex' and metric == 'selection_rate' and group == 'Female'")
assert abs(ours["value"].iloc[0] - frame.by_group.loc["Female", "selection rate"]) < 1e-12

# %% [markdown]
# ## From the files of a run
#
# `libmtl-fair run` writes `predictions_test.parquet`: one row a person, a table for any tool.

# %%
path = predictions.save(Path(tempfile.mkdtemp()) / "predictions_test.parquet")
saved = pd.read_parquet(path)
print(saved[["income/label", "income/prob", "long_hours/prob", "sensitive/sex"]].head(3).to_string())

# %% [markdown]
# ## Thresholds per group for one task
#
# `post_process` runs fairlearn's `ThresholdOptimizer` on a task's validation scores and keeps predicting through the trainer.

# %%
chosen = lf.metrics.post_process(trainer, "income", "equalized_odds", sensitive="sex")
decided = chosen.predict(data.test.loader(batch_size=2048), random_state=0)
print("selected at 0.5: ", round(float((predictions.scores["income"] > 0.5).double().mean()), 3), end=", ")
print("with thresholds per group: ", round(float(decided.mean()), 3))

# %% [markdown]
# ## As a scikit-learn estimator, under fairlearn's threshold optimiser

# %%
from fairlearn.postprocessing import ThresholdOptimizer

from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

X, y = data.train.x.numpy(), data.train.labels["income"].numpy().astype(int)
sex = [data.groups["sex"][i] for i in data.train.groups["sex"]]
classifier = FairMTLClassifier("none", epochs=EPOCHS, batch_size=512, random_state=0).fit(X, y)
optimiser = ThresholdOptimizer(
    estimator=classifier, constraints="demographic_parity", prefit=True, predict_method="predict_proba"
)
optimiser.fit(X, y, sensitive_features=sex)
for name, found in (
    ("plain", classifier.predict(X)),
    ("thresholds per group", optimiser.predict(X, sensitive_features=sex, random_state=0)),
):
    gap = MetricFrame(metrics=selection_rate, y_true=y, y_pred=found, sensitive_features=sex).difference()
    print(f"{name}: difference of selection rates {gap:.3f} (training rows)")

# %% [markdown]
# Thresholds per group need the group at prediction time; training with `method="fairmt"` does not. With several targets
# of different kinds and missing labels:

# %%
Y = pd.DataFrame({name: data.train.labels[name].numpy() for name in data.task_names})
Y.loc[::4, "long_hours"] = float("nan")
model = FairMTLEstimator("fairmt", epochs=EPOCHS, batch_size=512, random_state=0).fit(X, Y, sensitive_features=sex)
print(model.predict_proba(X[:3]).round(3).to_string())
