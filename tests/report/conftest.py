from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECIPE = """\
name: demo run
data: {name: adult, tasks: [%s], sensitive: [sex, race]}
seeds: %s
methods:
%s
"""


def group_rows(counts: dict[str, list[int]], **base: str) -> list[dict[str, Any]]:
    """Return the rows of metrics.json that follow from tn, fp, fn, tp of each group of one task and attribute."""
    entries: list[dict[str, Any]] = []
    rates: dict[str, list[float]] = {}
    for group, (tn, fp, fn, tp) in counts.items():
        n = tn + fp + fn + tp
        values = {"true_positive_rate": (tp, fn + tp), "false_positive_rate": (fp, tn + fp)}
        values |= {"selection_rate": (fp + tp, n), "accuracy": (tn + tp, n), "base_rate": (fn + tp, n)}
        for metric, (part, whole) in values.items():
            value = part / whole if whole else None
            rates.setdefault(metric, []).extend([] if value is None else [value])
            ends = {"low": None, "high": None} if value is None else {"low": value - 0.02, "high": value + 0.02}
            flag = "undefined" if value is None else "small" if n < 30 else None
            entries.append({**base, "metric": metric, "group": group, "value": value, "n": n, **ends, "flag": flag})
    gap = {metric: max(each) - min(each) for metric, each in rates.items() if each}
    shown = {"demographic_parity": gap["selection_rate"], "equal_opportunity": gap["true_positive_rate"]}
    shown["equalized_odds"] = max(gap["true_positive_rate"], gap["false_positive_rate"])
    for metric, value in shown.items():
        row = {"metric": metric, "group": "difference", "value": value, "n": 9769, "flag": None}
        entries.append({**base, **row, "low": value - 0.03, "high": value + 0.03})
    return entries


def _tamper(
    run_dir: Path, method: str, how: Callable[[str, str, str, list[int]], list[int]], part: str = "groups"
) -> None:
    """Change a method's decisions: ``how(task, attribute, group, [tn, fp, fn, tp])`` gives the new counts, for all seeds and splits."""
    for file in run_dir.glob(f"{method}/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        for split, rows in metrics["groups"].items():
            kept = [
                row for row in rows if not any(r["metric"] == "base_rate" for r in rows if r["task"] == row["task"])
            ]
            for task, attribute in dict.fromkeys((r["task"], r["attribute"]) for r in rows if r not in kept):
                own = [
                    r for r in rows if (r["task"], r["attribute"]) == (task, attribute) and r["group"] != "difference"
                ]
                counts: dict[str, list[int]] = {}
                for group in dict.fromkeys(r["group"] for r in own):
                    rates = {r["metric"]: r["value"] or 0 for r in own if r["group"] == group}
                    n = next(r["n"] for r in own if r["group"] == group)
                    positives = round(rates["base_rate"] * n)
                    tp = round(rates["true_positive_rate"] * positives)
                    fp = round(rates["false_positive_rate"] * (n - positives))
                    counts[group] = how(task, attribute, group, [n - positives - fp, fp, positives - tp, tp])
                kept += group_rows(counts, task=task, attribute=attribute)
            metrics.setdefault(part, {})[split] = kept
        file.write_text(json.dumps(metrics))


class Builder:
    """Writes a run folder as the contract says, with made-up but plausible numbers."""

    rows = staticmethod(group_rows)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tasks = {"income": "binary", "hours": "regression", "<script>alert(1)</script>": "binary"}
        self.methods = {"plain": "EW", "relif": "ReLiF", "fairmt": "FairMT"}
        self.groups = {"sex": ["Male", "Female"], "race": ["White", "Black", "Other & <b>x</b>"]}
        self.seeds = [0, 1, 2]
        self.deltas = {"0.275": 0.275, "p75": 0.212}
        self.shrinkage = True
        self.cards = True
        self.history = True
        self.splits = ("val", "test")

    def write(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(f"  {name}: {{weighting: {weighting}}}" for name, weighting in self.methods.items())
        names = ", ".join(json.dumps(task) for task in self.tasks)
        (self.root / "recipe.yaml").write_text(RECIPE % (names, self.seeds, lines))
        if self.cards:
            self._json("data_card.json", self._data_card())
            self._json(
                "environment.json", {"libmtl_fair": "0.1.0", "torch": "2.13.0", "python": "3.11", "device": "cpu"}
            )
            self._json("audit_protocol.json", self._protocol())
        for i, method in enumerate(self.methods):
            for seed in self.seeds:
                folder = self.root / method / f"seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([i, seed])
                self._json(folder / "metrics.json", self._metrics(method, i, seed, rng))
                if self.history:
                    self._history(folder / "history.csv", method, rng)
        return self.root

    def _json(self, path: str | Path, value: Any) -> None:
        (self.root / path).write_text(json.dumps(value))

    def _data_card(self) -> dict[str, Any]:
        return {
            "title": "UCI Adult <census>",
            "source": "UCI",
            "licence": "CC BY 4.0",
            "rows": 48842,
            "rows_in_source": 48842,
            "filter": "",
            "split": {"rows": {"train": 29305, "val": 9768, "test": 9769}, "seed": 0, "stratified_on": "income"},
            "inputs": ["age", "education"],
            "n_features": 60,
            "sensitive_inputs": ["sex"],
            "missing_inputs": {"workclass": 2799},
            "dropped": {"fnlwgt": "a weight"},
            "notes": ["Old data: 1994."],
            "tasks": {
                name: {
                    "kind": kind,
                    "definition": f"definition of {name}",
                    "labelled": 48000,
                    "missing": 842,
                    "n": 48000,
                    **({"rate": 0.24} if kind == "binary" else {"mean": 40.4, "std": 12.4}),
                    "per_group": {
                        attribute: {
                            group: {"rows": 10, "n": 10, "rate": 0.1 * (j + 1)} for j, group in enumerate(groups)
                        }
                        for attribute, groups in self.groups.items()
                    },
                }
                for name, kind in self.tasks.items()
            },
            "groups": {
                attribute: {
                    "missing": 12,
                    "missing_rule": "drop",
                    "left_out": 3,
                    "is_input": attribute == "sex",
                    "groups": {
                        group: {
                            "rows": 1000 // (j + 1),
                            "share": 0.5 / (j + 1),
                            "split": {"train": 600, "val": 200, "test": 200 if j < 2 else 21},
                        }
                        for j, group in enumerate(groups)
                    },
                }
                for attribute, groups in self.groups.items()
            },
        }

    def _protocol(self) -> dict[str, Any]:
        return {
            "deltas": self.deltas,
            "score_ranges": {"hours": [-1.2, 1.4]},
            "reference_model": "plain",
            "reference_seed": 0,
            "reference_data": "validation",
            "representation": "what the heads receive",
            "pair_distribution": "as audit pairs",
            "exact": True,
            "pool_size": 256,
            "n_pairs": 4096,
            "eval_seed": 0,
            "pair_seed": 42,
        }

    def _metrics(self, method: str, i: int, seed: int, rng: np.random.Generator) -> dict[str, Any]:
        drop = 0.004 * i
        settings = {"plain": {}, "relif": {"target": 0.1, "eta": 0.02}, "fairmt": {"epsilon": 0.05, "mu": 0.5}}
        return {
            "method": method,
            "seed": seed,
            "weighting": self.methods[method],
            "settings": settings.get(method, {}),
            "checkpoint": {"epoch": 7, "chosen_by": "validation macro AUC"},
            "utility": {split: self._utility(drop, rng) for split in self.splits},
            "audit": {split: self._audit(i, rng) for split in self.splits} if len(self.tasks) > 1 else {},
            "shrinkage": {split: self._shrinkage() for split in self.splits} if self.shrinkage and i == 0 else {},
            "groups": {split: self._groups(i, rng) for split in self.splits},
            "drift": {split: self._drift(i) for split in self.splits},
            "timing": {"train_s": 12.3 + i, "epochs": 10},
        }

    def _drift(self, i: int) -> dict[str, Any]:
        size = len(self.tasks)
        induced = [[0.0 if a == b else 0.1 + 0.02 * i for a in range(size)] for b in range(size)]
        return {"tasks": list(self.tasks), "induced": induced}

    def _utility(self, drop: float, rng: np.random.Generator) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, kind in self.tasks.items():
            if kind == "binary":
                auc, brier = 0.86 - drop, 0.14 + drop / 2
                found[name] = {"auc": auc + rng.normal(0, 0.002), "accuracy": 0.83 - drop, "brier": brier}
            else:
                found[name] = {"rmse": 11.2 + drop, "mae": 8.1 + drop, "r2": None}
        if "binary" in self.tasks.values():
            noise = rng.normal(0, 0.002)
            found["macro"] = {"auc": 0.833 - drop + noise, "accuracy": 0.81 - drop, "brier": 0.139 + drop / 2}
        else:
            found["macro"] = {"rmse": 11.2 + drop}
        return found

    def _audit(self, i: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        names = list(self.tasks)
        pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
        entries = []
        for name, delta in self.deltas.items():
            bias = (0.1 / (1 + i)) * (1.4 if name == "p75" else 1.0) + rng.normal(0, 0.002)
            pair = [
                {"task_a": a, "task_b": b, "bias": bias, "violation_rate": 2 * bias, "delta": delta} for a, b in pairs
            ]
            entry = {"delta_name": name, "delta": delta, "bias": bias, "violation_rate": 2 * bias, "exact": True}
            entries.append({**entry, "per_pair": pair})
        return entries

    def _shrinkage(self) -> list[dict[str, Any]]:
        return [
            {
                "delta_name": name,
                "a": a,
                "bias": 0.1 * scale * a**2,
                "brier": 0.139 + 0.1 * (1 - a) ** 2,
                "bias_slope": 0.2 * scale * a,
                "brier_slope": -0.2 * (1 - a),
            }
            for name, scale in zip(self.deltas, (1.0, 1.4))
            for a in (1.0, 0.8, 0.6, 0.4, 0.2)
        ]

    def _counts(self, i: int, j: int, rng: np.random.Generator) -> list[int]:
        """Return tn, fp, fn, tp of a group: lifted by later methods; the third has 21 people."""
        n = 21 if j == 2 else 4000 // (j + 1)
        positives = round(0.3 * n)
        tpr, fpr = 0.7 - 0.2 * j / (1 + i) + rng.normal(0, 0.005), 0.1 + 0.06 * j / (1 + i)
        tp, fp = round(tpr * positives), round(fpr * (n - positives))
        return [n - positives - fp, fp, positives - tp, tp]

    def _groups(self, i: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for task, kind in self.tasks.items():
            for attribute, groups in self.groups.items():
                base = {"task": task, "attribute": attribute}
                if kind == "binary":
                    entries += group_rows({g: self._counts(i, j, rng) for j, g in enumerate(groups)}, **base)
                    continue
                for metric in ("mae", "rmse"):
                    for j, group in enumerate(groups):
                        value, small = 0.7 - 0.1 * j / (1 + i) + rng.normal(0, 0.005), j == 2
                        entry = {
                            "metric": metric,
                            "group": group,
                            "value": value,
                            "n": 21 if small else 4000 // (j + 1),
                        }
                        interval = {"low": value - 0.02, "high": value + 0.02, "flag": "small" if small else None}
                        entries.append({**base, **entry, **interval})
                row = {"metric": "ks", "group": "difference", "value": 0.1, "n": 9769, "flag": None}
                entries.append({**base, **row, "low": None, "high": None})
        return entries

    def _history(self, path: Path, method: str, rng: np.random.Generator) -> None:
        steps = 600
        columns: dict[str, Any] = {"epoch": np.arange(steps) // 60, "step": np.arange(steps)}
        for task in self.tasks:
            columns[f"loss/{task}"] = 0.4 + 0.3 * np.exp(-np.arange(steps) / 80) + rng.normal(0, 0.02, steps)
        if method == "relif":
            columns["lambda"] = 0.1 * 1.004 ** np.arange(steps)
            columns["r_smooth"] = 0.3 * np.exp(-np.arange(steps) / 200) + 0.1
        if method == "fairmt":
            columns["phi"] = 0.25 * np.exp(-np.arange(steps) / 150) + 0.03
            columns["eta"] = np.clip(np.cumsum(0.05 * (columns["phi"] - 0.05)), 0, 10)
            weights = rng.dirichlet(np.ones(len(self.tasks)), steps)
            columns.update({f"w/{task}": weights[:, k] for k, task in enumerate(self.tasks)})
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow([*columns, "val/income/auc"])
            for k in range(steps):
                writer.writerow([*(values[k] for values in columns.values()), 0.8 if k % 60 == 59 else ""])


@pytest.fixture
def builder(tmp_path: Path) -> Callable[..., Builder]:
    def make(**changes: Any) -> Builder:
        made = Builder(tmp_path / "run")
        for name, value in changes.items():
            assert hasattr(made, name)
            setattr(made, name, value)
        return made

    return make


@pytest.fixture
def tamper() -> Callable[..., None]:
    return _tamper


@pytest.fixture
def run_dir(builder: Callable[..., Builder]) -> Path:
    return builder().write()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two methods and two seeds on a small part of adult; the reference trains each task alone."""
    from libmtl_fair.recipe import Recipe
    from libmtl_fair.recipe.run import run_recipe

    recipe = Recipe.from_dict(
        {
            "name": "tiny",
            "data": {"name": "adult", "tasks": ["income", "long_hours"], "sensitive": ["sex"], "subset": 600},
            "model": {"hidden": [8]},
            "train": {"epochs": 2, "batch_size": 64, "optimizer": {"optim": "adam", "lr": 0.01}},
            "seeds": [0, 1],
            "methods": {"plain": {"weighting": "EW", "single_task": True}, "relif": {"weighting": "ReLiF"}},
            "audit": {"delta": [0.275, "p75", "conformal:0.1"]},
            "metrics": {"n_bootstrap": 20},
            "output": {"report": False},
        }
    )
    return run_recipe(recipe, tmp_path_factory.mktemp("runs") / "tiny", device="cpu")
