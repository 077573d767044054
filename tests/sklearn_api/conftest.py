from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session")
def people():
    """600 people: X with text, gaps and numbers, Y of three kinds with missing labels, two sensitive attributes."""
    rng = np.random.default_rng(0)
    n = 600
    sex, race = rng.integers(0, 2, n), rng.integers(0, 3, n)
    signal = rng.normal(size=(n, 3)) + 0.6 * sex[:, None]
    X = pd.DataFrame({"a": signal[:, 0], "b": signal[:, 1], "city": np.array(["x", "y", "z"])[rng.integers(0, 3, n)]})
    X.loc[::17, "a"] = np.nan
    Y = pd.DataFrame(
        {
            "income": np.where(signal[:, 0] + 0.3 * rng.normal(size=n) > 0.3, "high", "low"),
            "level": rng.permuted(np.digitize(signal[:, 1], [-0.5, 0.5])),
            "hours": 40 + 5 * signal[:, 1] + rng.normal(size=n),
        }
    )
    Y["level"] = np.digitize(signal[:, 1], [-0.5, 0.8])
    Y["level"] = Y["level"].astype("Int64")
    Y.loc[::5, "income"] = None
    Y.loc[::7, "level"] = pd.NA
    Y.loc[::6, "hours"] = np.nan
    groups = pd.DataFrame({"sex": np.array(["f", "m"])[sex], "race": np.array(["p", "q", "r"])[race]})
    groups.loc[::50, "race"] = None
    return SimpleNamespace(
        X=X, Y=Y, groups=groups, y=(signal[:, 0] > 0.3).astype(int), numbers=signal.astype(np.float64)
    )
