"""A small table of people with every kind of column, and the README's suggested split written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from tests.harness.people import make_people


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
