"""The score-shrinkage baseline: how far Bias falls when the plain model's scores are merely pulled together (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import as_floats, as_numpy
from libmtl_fair.metrics.audit import FixedDeltaAudit
from libmtl_fair.metrics.utility import auc_score

GRID = tuple(np.round(np.linspace(1.0, 0.05, 20), 10))


def shrinkage_curve(
    probabilities: Mapping[str, Any],
    labels: Mapping[str, Any],
    delta: Any,
    *,
    centre: float = 0.5,
    grid: Sequence[float] = GRID,
) -> pd.DataFrame:
    """Return what ``p -> c + a (p - c)`` does to binary tasks: a row per ``a``, with Bias, violation rate, Brier, AUC.

    AUC does not change with ``a > 0``, nor does accuracy at ``centre``: a method has gained consistency only where its
    (Brier, Bias) lies below this curve of the *plain* model. Bias is exact, over all pairs. Source: ours (methods 1.1).

    Parameters
    ----------
    probabilities : task -> [N] in [0, 1]; at least two tasks.
    labels : task -> [N] of 0/1, NaN or negative where missing.
    delta : tolerance, a number or [T, T].

    Raises
    ------
    DataError : fewer than two tasks.
    """
    if len(probabilities) < 2:
        raise DataError(f"a shrinkage curve needs at least two binary tasks, found {list(probabilities)}")
    scores = {task: as_floats(values) for task, values in probabilities.items()}
    truth = {task: as_numpy(labels[task]).astype(np.float64) for task in scores}
    seen = {task: np.isfinite(values) & (values >= 0) for task, values in truth.items()}
    auc = float(np.nanmean([auc_score(scores[t][seen[t]], truth[t][seen[t]] > 0.5) for t in scores]))
    rows = []
    for a in grid:
        shrunk = {task: centre + a * (values - centre) for task, values in scores.items()}
        report = FixedDeltaAudit(delta, exact=True).run(shrunk)
        brier = np.nanmean([((shrunk[t][seen[t]] - truth[t][seen[t]]) ** 2).mean() for t in scores])
        rows.append((float(a), report.bias, report.violation_rate, float(brier), auc))
    return pd.DataFrame(rows, columns=["a", "bias", "violation_rate", "brier", "auc"])


def below_curve(bias: float, brier: float, curve: pd.DataFrame) -> tuple[bool, float]:
    """Return (whether a method lies below the curve, curve's Bias at the method's Brier minus its Bias).

    Only the part of the curve after its lowest Brier counts (shrinking an overconfident model improves Brier at first).
    A Brier below that lowest is compared with the Bias there; one beyond the curve's end with the Bias at the end.

    >>> curve = pd.DataFrame({"a": [1.0, 0.5], "bias": [0.1, 0.0], "brier": [0.10, 0.20]})
    >>> below, gap = below_curve(0.04, 0.15, curve)
    >>> below, round(gap, 6)
    (True, 0.01)
    """
    ordered = curve.sort_values("a", ascending=False)
    brier_of, bias_of = ordered["brier"].to_numpy(), ordered["bias"].to_numpy()
    start = int(np.argmin(brier_of))
    there = float(np.interp(brier, brier_of[start:], bias_of[start:]))
    return bias < there, there - bias
