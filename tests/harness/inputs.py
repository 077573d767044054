"""Tensors and arrays as they come: trained on or measured with the right numbers, or refused with an error of ours.

    python -m tests.harness.inputs --n 10000

What is taken is compared with a plain computation: losses and AUC with loops over rows and scikit-learn, rates with sums over masks.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.errors import FairMTLError
from libmtl_fair.models import Heads
from tests.harness.common import Trials, WrongNumberError, main

METHODS: dict[str, dict[str, Any]] = {
    "EW": {},
    "ReLiF": {"pairs": "random"},
    "FairMT": {"min_count": 2},
    "FBGrad": {},
    "GroupRegulariser": {},
    "LambdaMix": {"lam": 0.7},
    "MGDA": {},
}
KINDS: list[Callable[[str], Any]] = [
    lf.Binary,
    lf.Regression,
    lambda t: lf.Multiclass(t, 3),
    lambda t: lf.Multilabel(t, 2),
]
NAMES = ["a", "b", "c", "hours.per.week", "type", "forward", "=x", "\x1b[2J"]


def _wild(draw: random.Random, values: Tensor) -> Tensor:
    """Return the values in another form, or with something in them that does not belong there."""
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda v: v.double(), lambda v: v.bfloat16(), lambda v: v.long(), lambda v: v.bool(), lambda v: v.to(torch.uint8),
        lambda v: v.unsqueeze(1), lambda v: v * 2 - 1, lambda v: v * 5, lambda v: v.flip(0), lambda v: v[:-1], lambda v: v[:0],
        lambda v: v + 10**15, lambda v: v - 1, lambda v: v.float().index_fill(0, torch.tensor([0]), math.nan),
        lambda v: v.float().index_fill(0, torch.tensor([0]), math.inf), lambda v: v * math.nan, lambda v: v.unsqueeze(0),
        lambda v: v.float() + 0.5, lambda v: v.to(torch.complex64), lambda v: v.expand(2, *v.shape), lambda v: v * 0,
    ]  # fmt: skip
    return draw.choice(forms)(values)


def _labels(task: Any, n: int, g: torch.Generator) -> Tensor:
    if task.kind == "regression":
        return torch.randn(n, generator=g)
    if task.kind == "multiclass":
        return torch.randint(0, 3, (n,), generator=g)
    y = torch.randint(0, 2, (n, 2) if task.kind == "multilabel" else (n,), generator=g).float()
    return y.masked_fill(torch.rand(y.shape, generator=g) < 0.2, math.nan)


def _world(draw: random.Random) -> tuple[int, torch.Generator, list[Any], dict[str, Tensor], Tensor]:
    n, g = draw.choice([1, 2, 7, 24, 40]), torch.Generator().manual_seed(draw.randrange(2**31))
    tasks = [draw.choice(KINDS)(name) for name in draw.sample(NAMES, draw.randint(1, 3))]
    labels = {task.name: _labels(task, n, g) for task in tasks}
    return n, g, tasks, labels, torch.randint(-1, 2, (n,), generator=g)


def training(draw: random.Random) -> str:
    """One epoch of any method on any tasks, from our loader or torch's, and predictions."""
    n, g, tasks, labels, groups = _world(draw)
    x = torch.randn(n, 5, generator=g)
    if draw.random() < 0.6:
        where = draw.choice([*labels, "x", "groups"])
        if where == "x":
            x = _wild(draw, x)
        elif where == "groups":
            groups = _wild(draw, groups)
        else:
            labels[where] = _wild(draw, labels[where])
    method = draw.choice(list(METHODS))
    entries, heads = lf.task_dict(tasks), Heads({t.name: nn.Linear(6, t.out_features) for t in tasks})
    if method == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, draw.choice(["glf", "gap", "dpl"]), sensitive=("sex",))
    if draw.random() < 0.5:
        loader: Any = lf.ResidentLoader(x, labels, {"sex": groups}, batch_size=8, shuffle=True, seed=0, device="cpu")
    else:
        least = min(len(x), len(groups), *(len(y) for y in labels.values()))
        each = [(x[i], {**{k: y[i] for k, y in labels.items()}, "sensitive": {"sex": groups[i]}}) for i in range(least)]
        loader = DataLoader(each, batch_size=8) if each else []
    trainer = lf.FairTrainer(
        entries, method, "FairBranch" if method == "FBGrad" else "HPS",
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)), heads, False, False,
        {"optim": "sgd", "lr": 0.01}, None, device="cpu", progress=False, select="last", weight_args=METHODS[method], seed=0,
    )  # fmt: skip
    warnings.filterwarnings(
        "ignore", r"([A-Za-z]+: |no validation loader|after \d+ steps)"
    )  # what a method says of itself
    trainer.train(loader, epochs=1)
    found = trainer.predict(loader)
    if not all(bool(p.isfinite().all()) for p in trainer.model.parameters()):
        raise WrongNumberError("a parameter is not finite after training")
    for name, (value, seen) in _losses(found).items():
        got = trainer.test(loader)[name]["loss"]
        value = math.inf if value > torch.finfo(torch.float32).max else value  # more than the model's numbers hold
        if seen and not (
            math.isclose(got, value, rel_tol=1e-3, abs_tol=1e-5) or (math.isnan(got) and math.isnan(value))
        ):
            raise WrongNumberError(f"{method}: loss of {name!r} is {got}, by rows {value}")
    return "trained"


def _losses(found: Any) -> dict[str, tuple[float, int]]:
    """Return task -> mean loss over labelled rows by a loop over them, and how many there are."""
    result = {}
    for task in found.tasks:
        each = []
        for z, y in zip(found.outputs[task.name].double().tolist(), found.labels[task.name].double().tolist()):
            y = y[0] if isinstance(y, list) and task.kind != "multilabel" else y
            if task.kind == "multilabel":
                own = [math.log1p(math.exp(-abs(a))) + max(a, 0) - a * b for a, b in zip(z, y) if not math.isnan(b)]
                each += [sum(own) / len(own)] if own else []
            elif math.isnan(y) or y == -100:
                continue
            elif task.kind == "multiclass":
                each.append(max(z) + math.log(sum(math.exp(a - max(z)) for a in z)) - z[int(y)])
            else:
                a = z
                while isinstance(a, list):  # [B, 1], and [B, 1, 1] of inputs [B, 1, d]
                    a = a[0]
                each.append(
                    (a - y) ** 2 if task.kind == "regression" else math.log1p(math.exp(-abs(a))) + max(a, 0) - a * y
                )
        result[task.name] = (sum(each) / len(each) if each else math.nan, len(each))
    return result


def streamed(draw: random.Random) -> str:
    """GroupMetrics over one or two batches against sums over masks."""
    n, g, tasks, labels, groups = _world(draw)
    outputs = {t.name: torch.randn(n, t.out_features, generator=g) for t in tasks}
    weight = torch.rand(n, generator=g) if draw.random() < 0.3 else None
    if draw.random() < 0.6:
        where = draw.choice(["labels", "outputs", "groups", "weight"])
        if where == "groups":
            groups = _wild(draw, groups)
        elif where == "weight":
            weight = _wild(draw, torch.rand(n, generator=g))
        else:
            held = labels if where == "labels" else outputs
            name = draw.choice(list(held))
            held[name] = _wild(draw, held[name])
    found = metrics.GroupMetrics(tasks, {"sex": 2}, confidence=None)
    for _ in range(draw.randint(1, 2)):  # the same batch twice changes no rate
        found.update(outputs, labels, {"sex": groups}, weight)
    table = found.compute().set_index(["task", "metric", "group"])["value"]
    for task in tasks:
        if task.kind == "binary":
            z, y = (v[task.name].double().reshape(-1).numpy() for v in (outputs, labels))
            w = np.ones(n) if weight is None else weight.double().numpy()
            y = np.where(y == -100, math.nan, y)
            for group in (0, 1):
                rows = (groups.numpy() == group) & (y == 1)
                wanted = w[rows & (z > 0)].sum() / w[rows].sum() if w[rows].sum() > 0 else math.nan
                got = float(table[task.name, "true_positive_rate", str(group)])
                if not (math.isclose(got, wanted, rel_tol=1e-9) or (math.isnan(got) and math.isnan(wanted))):
                    raise WrongNumberError(f"TPR of group {group} is {got}, by masks {wanted}")
    return "measured"


def arrays(draw: random.Random) -> str:
    """group_rates and auc_score on arrays of any type against sums over masks and scikit-learn."""
    n, rng = draw.choice([1, 2, 7, 40, 300]), np.random.default_rng(draw.randrange(2**31))
    given: dict[str, Any] = {
        "y": rng.integers(0, 2, n), "p": rng.integers(0, 2, n), "g": rng.integers(-1, 3, n), "s": rng.random(n).round(1),
    }  # fmt: skip
    if draw.random() < 0.6:
        name = draw.choice(list(given))
        forms: list[Callable[[Any], Any]] = [
            lambda v: v.astype(float), lambda v: v.astype(np.int8), lambda v: v.astype(np.uint64), lambda v: v.astype(object),
            lambda v: v.astype(str), lambda v: v.tolist(), lambda v: v[::-1], lambda v: v * 2 - 1, lambda v: v + 2**62,
            lambda v: np.where(np.arange(len(v)) == 0, np.nan, v), lambda v: v[:, None], lambda v: v[:-1], lambda v: v.astype(bool),
            lambda v: np.where(np.arange(len(v)) == 0, np.inf, v), lambda v: torch.as_tensor(v), lambda v: v - 0.5, lambda v: None,
        ]  # fmt: skip
        given[name] = draw.choice(forms)(given[name])
    y, p, g, s = given.values()
    said = 0
    try:
        rates = metrics.group_rates(y, p, g, n_groups=3)
    except FairMTLError:
        said += 1
    else:
        named = list(rates.names)  # labels, not ids: in the order of their names
        c = [named.index(str(v)) for v in np.asarray(g).reshape(-1)] if named else g
        a, b, c = (np.asarray(v, dtype=float).reshape(-1) for v in (y, p, c))
        wanted = [b[(c == k) & (a == 1)].mean() if ((c == k) & (a == 1)).any() else math.nan for k in range(3)]
        if not np.allclose(rates.rate("true_positive_rate"), wanted, equal_nan=True):
            raise WrongNumberError(f"TPR {rates.rate('true_positive_rate')}, by masks {wanted}")
    try:
        auc = metrics.auc_score(s, y)
    except FairMTLError:
        said += 1
    else:
        labels = np.asarray(y, dtype=float)
        wanted_auc = roc_auc_score(labels, np.asarray(s, dtype=float)) if 0 < labels.sum() < len(labels) else math.nan
        if not (math.isclose(auc, wanted_auc, rel_tol=1e-9) or (math.isnan(auc) and math.isnan(wanted_auc))):
            raise WrongNumberError(f"AUC {auc}, scikit-learn {wanted_auc}")
    return ("measured", "one of two refused", "both refused")[said]


TRIALS: Trials = {"training": (1, training), "streamed metrics": (1, streamed), "arrays": (2, arrays)}

if __name__ == "__main__":
    main(__doc__ or "", TRIALS, 10_000)
