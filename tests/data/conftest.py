"""A small table of people with every kind of column, and the README's suggested split written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split


def make_people(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 90, n),
            "height": rng.normal(170, 10, n).round(1),
            "job": rng.choice(["clerk", "nurse", "smith"], n),
            "sex": rng.choice(["female", "male"], n),
            "race": rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "sick": rng.integers(0, 2, n),
            "state": rng.choice(["good", "fair", "poor"], n),
            "pain": rng.integers(0, 2, n),
            "cough": rng.integers(0, 2, n),
            "cost": np.exp(rng.normal(3, 1, n)),
        }
    )
    frame.loc[::11, "height"] = np.nan
    frame.loc[3::17, "job"] = None
    frame.loc[5::19, "race"] = None
    frame["sick"] = frame["sick"].astype(float)
    frame.loc[2::13, "sick"] = np.nan
    frame.loc[4::23, "state"] = None
    return frame


def readme_split(y: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, rest = train_test_split(np.arange(len(y)), train_size=0.6, random_state=seed, stratify=y)
    val, test = train_test_split(rest, train_size=0.5, random_state=seed, stratify=y[rest])
    return train, val, test


@pytest.fixture
def people() -> pd.DataFrame:
    return make_people()


@pytest.fixture
def people_of() -> Callable[..., pd.DataFrame]:
    return make_people


@pytest.fixture
def suggested_split() -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return readme_split
