from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe

METHODS = {
    "plain": {"weighting": "EW"},
    "branched": {"weighting": "FBGrad", "architecture": "FairBranch"},
    "glf": {"weighting": "LambdaMix", "heads": {"loss": "glf", "sensitive": ["sex"], "tasks": ["rich"]}},
    "by_group": {"weighting": "EW", "heads": {"loss": "group_specific", "sensitive": ["sex"], "tasks": ["rich"]}},
    "alone": {"weighting": "EW", "single_task": True},
    "blind": {"weighting": "EW", "unaware": True},
    "mixed": {"post": "blend", "of": ["plain", "blind"], "strength": 0.3},
    "lifted": {"post": "offsets", "attribute": "sex", "strength": 0.5},
    "cut": {"post": "thresholds", "attribute": "sex", "constraint": "demographic_parity"},
    "reduced": {"post": "exponentiated_gradient", "attribute": "sex", "max_iter": 3, "eps": 0.05},
    "boosted": {"post": "exponentiated_gradient", "attribute": "sex", "max_iter": 2, "estimator": "boosting"},
}


def people(n: int = 700, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age, sex = rng.integers(18, 80, n), rng.choice(["f", "m"], n)
    job = rng.choice(["clerk", "cook", "smith"], n, p=[0.5, 0.3, 0.2])
    frame = pd.DataFrame(
        {
            "age": age,
            "sex": sex,
            "race": rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "job": job,
            "score": np.where(rng.random(n) < 0.1, np.nan, rng.normal(size=n)),
            "rich": np.where(age + 10 * (sex == "m") + rng.normal(0, 10, n) > 60, "yes", "no"),
            "colour": np.array(["red", "green", "blue"])[(age // 3 + (job == "cook")) % 3],
            "pay": np.exp(7 + age / 40 + rng.normal(0, 0.1, n)),
            "reads": rng.integers(0, 2, n),
            "sings": rng.integers(0, 2, n),
        }
    )
    frame.loc[frame.index % 50 == 7, "sex"] = np.nan
    return frame


def make_recipe(table: Path, methods=METHODS, **changes) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "people",
            "data": {
                "table": str(table),
                "features": ["age", "sex", "race", "job", "score"],
                "tasks": {
                    "rich": {"kind": "binary", "positive": "yes"},
                    "colour": {"kind": "multiclass"},
                    "pay": {"kind": "regression", "transform": "log"},
                    "hobbies": {"kind": "multilabel", "columns": ["reads", "sings"]},
                },
                "sensitive": {
                    "sex": {"column": "sex"},
                    "age": {"column": "age", "bins": [40]},
                    "race": {"column": "race", "merge": {"c": "other"}},
                    "both": {"of": ["sex", "age"]},
                },
                "missing": "group",
                **changes.pop("data", {}),
            },
            "model": {"hidden": [8, 8]},
            "train": {"epochs": 3, "batch_size": 64, "optimizer": {"optim": "adam", "lr": 0.01}},
            "methods": methods,
            "metrics": {"n_bootstrap": 0, "threshold": "base_rate"},
            "audit": {"people": "off", "shrinkage": False},
            "output": {"report": False},
            **changes,
        }
    )


@pytest.fixture(scope="session")
def frame() -> pd.DataFrame:
    return people()


@pytest.fixture(scope="session")
def recipe():
    return make_recipe


@pytest.fixture(scope="session")
def run(tmp_path_factory, frame) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    frame.to_csv(folder / "people.csv", index=False)
    return run_recipe(make_recipe(folder / "people.csv"), folder / "run", device="cpu")
