"""A small table of people with every kind of column, some cells missing."""

from __future__ import annotations

import numpy as np
import pandas as pd


def make_people(n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Return a table with every kind of column, some cells missing."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 90, n),
            "height": rng.normal(170, 10, n).round(1),
            "job": rng.choice(["clerk", "nurse", "smith"], n),
            "sex": rng.choice(["female", "male"], n),
            "race": rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "sick": rng.integers(0, 2, n).astype(float),
            "state": rng.choice(["good", "fair", "poor"], n),
            "pain": rng.integers(0, 2, n),
            "cough": rng.integers(0, 2, n),
            "cost": np.exp(rng.normal(3, 1, n)),
        }
    )
    for start, step, column in ((0, 11, "height"), (3, 17, "job"), (5, 19, "race"), (2, 13, "sick"), (4, 23, "state")):
        frame.loc[start::step, column] = np.nan
    return frame
