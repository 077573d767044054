"""Seeded, stratified splits that can be repeated outside of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import Series
from libmtl_fair.data.labels import RawLabels
from libmtl_fair.errors import DataError

Rows = NDArray[np.int64]
PARTS = ("train", "val", "test")
_SMALLEST_STRATUM = 10


def strata(labels: RawLabels) -> NDArray[np.int64]:
    """Return the stratum of each row: its class, the tenth its target is in, or "missing"; small ones are merged.

    Strata of fewer than 10 rows become one, and that one joins the largest if it is still smaller than that.
    """
    values = labels.values if labels.values.ndim == 1 else labels.values[:, 0]
    if labels.spec.kind == "regression":
        values = pd.qcut(pd.Series(values), 10, labels=False, duplicates="drop").to_numpy()
    _, codes, counts = np.unique(
        np.where(np.isnan(values), -1, values).astype(np.int64), return_inverse=True, return_counts=True
    )
    small = counts[codes] < _SMALLEST_STRATUM
    if small.any():
        codes = np.where(small, -1 if small.sum() >= _SMALLEST_STRATUM else int(np.argmax(counts)), codes)
    return np.asarray(codes, dtype=np.int64)


def split_rows(y: NDArray[Any] | None, n_rows: int, split: Sequence[float], seed: int) -> dict[str, Rows]:
    """Return the rows of train, val and test, in scikit-learn's shuffled order.

    Two calls of ``train_test_split`` with ``random_state=seed``: first the training share, then the rest is divided; both
    stratified on ``y`` (without ``y``, not).
    """
    from sklearn.model_selection import train_test_split

    shares = tuple(split)
    numbers = all(isinstance(share, int | float) and 0 < share < 1 for share in shares)
    if len(shares) != 3 or not numbers or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            f"split must be three shares above 0 that sum to 1 (train, val, test), found {shares}; none may be empty"
        )
    try:
        train, rest = train_test_split(np.arange(n_rows), train_size=shares[0], random_state=seed, stratify=y)
        within = round(shares[1] / (shares[1] + shares[2]), 12)
        strata_of_rest = None if y is None else y[rest]
        val, test = train_test_split(rest, train_size=within, random_state=seed, stratify=strata_of_rest)
    except ValueError as error:
        raise DataError(
            f"{n_rows} rows cannot be split {shares}, an empty or too small part would result: {error}"
        ) from error
    return {"train": train, "val": val, "test": test}


def split_by_column(series: Series) -> dict[str, Rows]:
    """Return the rows of each part as a column of "train", "val" and "test" says; rows with no value are left out."""
    values = series.astype(object).where(series.notna(), None).to_numpy()
    wrong = sorted({str(value) for value in values if value is not None} - set(PARTS))
    if wrong:
        raise DataError(f"split column {series.name!r}: expected 'train', 'val' and 'test', found {wrong[0]!r}")
    parts = {part: np.flatnonzero(values == part) for part in PARTS}
    for part, rows in parts.items():
        if len(rows) == 0:
            raise DataError(f"split column {series.name!r}: the {part} split is empty; give it rows")
    return parts


def draw_subset(y: NDArray[Any] | None, n_rows: int, subset: int | float | None, seed: int) -> Rows:
    """Return the sorted rows of a stratified random subset: a number of rows (int), or a share (float in (0, 1))."""
    from sklearn.model_selection import train_test_split

    if subset is None or subset == n_rows:
        return np.arange(n_rows)
    a_count = isinstance(subset, int) and not isinstance(subset, bool) and 0 < subset <= n_rows
    if not (a_count or (isinstance(subset, float) and 0 < subset < 1)):
        raise DataError(f"subset must be a number of rows (1 to {n_rows}) or a share between 0 and 1, found {subset!r}")
    try:
        rows, _ = train_test_split(np.arange(n_rows), train_size=subset, random_state=seed, stratify=y)
    except ValueError as error:
        raise DataError(f"subset={subset!r} of {n_rows} rows: {error}; take more rows") from error
    return np.sort(rows)
