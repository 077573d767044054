"""Open questions of the sources and hybrids of methods, answered with numbers: the tables of docs/QUESTIONS.md.

Small tables (compas by race, german by age, a census of 5,000 people whose sex moves the first label, :func:`untouched.census`), five
splits each, an MLP 64-32. Measures are of test data: AUC (mean over tasks), EO (worst binary task and attribute, decisions at 0.5, and
at the base-rate threshold of validation data) and the inconsistency I between people who are alike. A cell is the mean difference to
the row that a table names first, in points, with its 95 % interval over the splits (Student's t).

    python benchmarks/questions.py                  # minutes; writes the tables into docs/QUESTIONS.md
    python benchmarks/questions.py --smoke          # seconds: one split, one epoch; prints, and its numbers mean nothing
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch and numpy are imported

import argparse
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from untouched import census

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.data import Dataset, load_dataset, load_table
from libmtl_fair.files import write_text
from libmtl_fair.metrics.consistency import audit_people
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.predictions import Predictions

PAGE = Path(__file__).parents[1] / "docs" / "QUESTIONS.md"
Values = tuple[float, float, float, float]
Change = Callable[[Dataset, int], Dataset]


@dataclass(frozen=True)
class Method:
    """A weighting with its settings; ``deep`` puts a hidden layer into the heads, ``change`` changes the training data."""

    weighting: str = "EW"
    args: Mapping[str, Any] = field(default_factory=dict)
    deep: bool = False
    change: Change | None = None


def noisy(data: Dataset, seed: int, share: float = 0.3) -> Dataset:
    """Return the data with a share of the binary training labels of the smallest group drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    ids = next(iter(data.train.groups.values()))
    smallest = int(ids[ids >= 0].bincount().argmin())
    labels = dict(data.train.labels)
    for task in data.tasks:
        if task.kind == "binary":
            drawn = (torch.rand(len(ids), generator=generator) < share) & (ids == smallest)
            coin = torch.randint(0, 2, (len(ids),), generator=generator).to(labels[task.name])
            labels[task.name] = torch.where(drawn, coin, labels[task.name])
    return dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))


def _bases(*names: str) -> dict[str, Method]:
    found = {}
    for name in names:
        args = {"alpha": 1.0} if name == "torchjd:FairGrad" else {}
        over = {"pairs": "near", "base": name, **({"base_args": args} if args else {})}
        found |= {name: Method(name, args), f"ReLiF over {name}": Method("ReLiF", over)}
    return found


def _fairmt(**args: Any) -> Method:
    return Method("FairMT", args)


SHARES = (0.85, 0.65)
PLANS = ("5 epochs of 1024", "10 epochs of 512", "20 epochs of 256")
QUESTIONS: dict[str, tuple[tuple[str, ...], dict[str, Method]]] = {
    "bases": (("compas",), _bases("EW", "GradNorm", "IMTL", "PCGrad", "torchjd:UPGrad", "torchjd:FairGrad")),
    "composition": (
        ("compas",),
        {
            "plain": Method(),
            "ReLiF": Method("ReLiF", {"pairs": "near"}),
            "FairMT": _fairmt(),
            "FairMT, Lipschitz term": _fairmt(lipschitz=True),
            "FairMT, near pairs": _fairmt(near=0.7),
        },
    ),
    "lengths": (
        tuple(f"{name}, {plan}" for name in ("compas", "census", "adult@8000") for plan in PLANS),
        {"plain": Method(), "FairMT": _fairmt()},
    ),
    "deep": (
        ("census",),
        {
            f"{name}{', deep heads' if deep else ''}": dataclasses.replace(method, deep=deep)
            for deep in (False, True)
            for name, method in {
                "plain": Method(),
                "ReLiF": Method("ReLiF", {"pairs": "near"}),
                "FairMT": _fairmt(),
            }.items()
        },
    ),
    "noise": (
        ("compas", "german"),
        {
            f"{name}{', noisy' if change else ''}": dataclasses.replace(method, change=change)
            for change in (None, noisy)
            for name, method in {
                "plain": Method(),
                "FairMT, max": _fairmt(form="constraints"),
                "FairMT, lcb": _fairmt(form="constraints", reference="lcb"),
            }.items()
        },
    ),
    "tolerances": (
        ("compas2",),
        {
            "plain": Method(),
            "race and sex at .05": _fairmt(target="eo <= 0.05"),
            "race at .05, sex at .15": _fairmt(
                targets={t: {"race": "eo <= 0.05", "sex": "eo <= 0.15"} for t in ("two_year_recid", "is_violent_recid")}
            ),
            "race and sex crossed at .05": _fairmt(target="eo <= 0.05", intersectional=True),
        },
    ),
    "carried": (
        ("compas", "german", "census", "adult"),
        {"plain": Method()} | {f"share {s}": Method("ReLiF", {"pairs": "near", "share": s}) for s in SHARES},
    ),
}
"""Question -> its data sets (with a plan of training), and row -> method; the first row is what the others are compared with."""


@functools.lru_cache(maxsize=2)
def load(name: str, seed: int, small: bool) -> Dataset:
    """Return a data set split by a seed; ``name@n`` takes so many rows."""
    name, _, some = name.partition("@")
    rows: dict[str, Any] = {"subset": 600} if small else {}
    if name == "census":
        tasks = {"high_income": {"kind": "binary"}, "insured": {"kind": "binary"}}
        return load_table(
            census(800 if small else 5000, -1.0, 11).drop(columns="commute"),
            tasks=tasks, sensitive={"sex": {"column": "sex"}}, seed=seed,
        )  # fmt: skip
    tasks_of = {"german": ["bad_credit", "owns_home"], "adult": ["income", "never_married", "long_hours"]}
    sensitive = {"german": ["age"], "adult": ["sex"], "compas2": ["race", "sex"]}.get(name, ["race"])
    options = (
        {"keep_groups": {"race": 2}}
        if name.startswith("compas")
        else {"subset": int(some or 4000)}
        if name == "adult"
        else {}
    )
    tasks = tasks_of.get(name, ["two_year_recid", "is_violent_recid"])
    return load_dataset(name.removesuffix("2"), tasks, sensitive, seed=seed, **{**options, **rows})


def heads_of(tasks: Sequence[lf.Task], deep: bool) -> nn.ModuleDict:
    """Return linear heads, or heads with a hidden layer of 32."""
    heads = linear_heads(tasks, 32)
    return nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), head) if deep else head for name, head in heads.items()}
    )


def measured(name: str, method: Method, seed: int, small: bool) -> Values:
    """Return AUC, EO at both thresholds and I of one training on test data, in points."""
    name, _, plan = name.partition(", ")
    epochs, batch = map(int, plan.split(" epochs of ")) if plan else (8, 256)
    data = load(name, seed, small)
    seen = data if method.change is None else method.change(data, seed)
    torch.manual_seed(seed)
    trainer = lf.FairTrainer(
        lf.task_dict(data.tasks), method.weighting, "HPS", lambda: MLP(data.n_features, (64, 32)), heads_of(data.tasks, method.deep),
        False, False, {"optim": "adam", "lr": 2e-3, "weight_decay": 1e-5}, None, device="cpu", progress=False, seed=seed,
        weight_args=dict(method.args), select="last",
    )  # fmt: skip
    trainer.train(seen.train.loader(batch, shuffle=True, seed=seed, device="cpu"), epochs=1 if small else epochs)
    val, test = (trainer.predict(part.loader(8192, device="cpu")) for part in (data.val, data.test))
    people = audit_people(audit_of(name, seed, small), test, val)
    eo = 100 * _eo(test, 0.5), 100 * _eo(test, metrics.base_rate_thresholds(val))
    return 100 * metrics.utility(test)["macro"]["auc"], *eo, 100 * people.inconsistency


def _eo(test: Predictions, bars: float | Mapping[str, Any]) -> float:
    sizes = {name: len(names) for name, names in test.group_names.items()}
    found = metrics.GroupMetrics(list(test.tasks), sizes, threshold=bars, n_bootstrap=0, min_group_size=0)
    table = found.update(test.outputs, test.labels, test.groups).compute()
    kept = (table["metric"] == "equalized_odds") & (table["group"] == "difference")
    return float(table.loc[kept, "value"].max())


@functools.lru_cache(maxsize=1)
def audit_of(name: str, seed: int, small: bool) -> metrics.ConsistencyAudit:
    """Return the audit of the people of a split's test data."""
    data = load(name, seed, small)
    assert data.reference is not None
    return metrics.ConsistencyAudit(data.reference.features(data.test.x.double()).numpy())


def interval(values: Sequence[float]) -> str:
    """Return a mean and its 95 % interval by Student's t."""
    x = np.array(values)
    if len(x) < 2:
        return f"{x.mean():+.1f}"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():+.1f} [{x.mean() - half:+.1f}, {x.mean() + half:+.1f}]"


def table(question: str, seeds: Sequence[int], small: bool) -> str:
    """Return a question's table as Markdown."""
    names, methods = QUESTIONS[question]
    lines = ["| data | method | AUC | EO, 0.5 | EO, base rate | I |", "|---|---|---|---|---|---|"]
    for name in names[: 2 if small else None]:
        by_seed = [{row: measured(name, method, seed, small) for row, method in methods.items()} for seed in seeds]
        found = {row: np.array([each[row] for each in by_seed]) for row in methods}
        first = next(iter(methods))
        lines.append(f"| {name} | {first} | " + " | ".join(f"{v:.1f}" for v in found[first].mean(0)) + " |")
        for row in list(methods)[1:]:
            cells = [interval(column) for column in (found[row] - found[first]).T]
            lines.append(f"| {name} | {row} | {' | '.join(cells)} |")
        print(f"{question}: {name} done", flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure; write each table between its marks in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(QUESTIONS))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for question in chosen.only or QUESTIONS:
        made = table(question, [0] if chosen.smoke else range(20, 25), chosen.smoke)
        print(made)
        if not chosen.smoke:
            mark = re.compile(rf"(<!-- {question} -->\n).*?(\n<!-- end -->)", re.DOTALL)
            text = chosen.page.read_text(encoding="utf-8")
            write_text(chosen.page, mark.sub(lambda found, made=made: found[1] + made + found[2], text))


if __name__ == "__main__":
    main()
