"""Comparing methods: Delta_m, mean rank, gains over single tasks, paired differences over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Floats, as_floats

Results = Mapping[str, Mapping[str, float]]
"""method -> metric (one per task, or several) -> value."""


def delta_m(
    results: Results, baseline: Mapping[str, float], higher_is_better: Mapping[str, bool] | bool = True
) -> dict[str, float]:
    """Return each method's mean relative change against ``baseline`` in per cent; lower is better (Navon et al., ICML 2022).

    ``Delta_m = 100 / K sum_k (-1)^(s_k) (M_m,k - M_b,k) / M_b,k`` with s_k = 1 where higher is better. A metric that is NaN, or 0
    in the baseline, leaves the mean of that method (NaN if none is left).

    Raises
    ------
    DataError : a method lacks one of the baseline's metrics.

    >>> {m: round(v, 9) for m, v in delta_m({"fair": {"auc": 0.81}}, {"auc": 0.9}).items()}
    {'fair': 10.0}
    """
    base = as_floats(list(baseline.values()))
    sign = _signs(baseline, higher_is_better)
    found = {}
    for method, values in _table(results, list(baseline)).items():
        with np.errstate(invalid="ignore", divide="ignore"):
            change = -sign * (values - base) / base
        found[method] = _mean(100 * np.where(base == 0, np.nan, change))
    return found


def mean_rank(results: Results, higher_is_better: Mapping[str, bool] | bool = True) -> dict[str, float]:
    """Return each method's rank, averaged over metrics; 1 is best, ties share their mean (Navon et al., ICML 2022).

    A method without a value for a metric ranks last there.

    >>> mean_rank({"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.8, "y": 0.2}})
    {'a': 1.5, 'b': 1.5}
    """
    if not results:
        return {}
    metrics = list(next(iter(results.values())))
    values = np.stack(list(_table(results, metrics).values()))
    frame = pd.DataFrame(-values * _signs(dict.fromkeys(metrics, 0.0), higher_is_better))
    ranks = frame.rank(method="average", na_option="bottom").mean(axis=1)
    return dict(zip(results, ranks.astype(float)))


def worst_and_macro(results: Results, higher_is_better: Mapping[str, bool] | bool = True) -> pd.DataFrame:
    """Return each method's worst and mean normalised score over metrics, 0 for the worst method and 1 for the best.

    A metric on which all methods agree counts 1 for all (ours).
    """
    metrics = list(next(iter(results.values())))
    values = np.stack(list(_table(results, metrics).values())) * _signs(dict.fromkeys(metrics, 0.0), higher_is_better)
    low, high = values.min(0), values.max(0)
    scaled = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 1.0)
    return pd.DataFrame({"worst": scaled.min(1), "macro": scaled.mean(1)}, index=list(results))


def knowledge_gain(multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    """Return KG_t = accuracy of task t in the multi-task model - in its single-task model (FairBranch); >= 0 is good.

    >>> {t: round(v, 9) for t, v in knowledge_gain({"a": 0.9}, {"a": 0.8}).items()}
    {'a': 0.1}
    """
    return _gain("knowledge_gain", multi, single)


def discrimination_gain(multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    """Return DG_t = violation of task t in the multi-task model - in its single-task model (FairBranch); <= 0 is good.

    A violation is :func:`violation`'s EP or EO.
    """
    return _gain("discrimination_gain", multi, single)


def violation(rates: Mapping[str, Sequence[float]]) -> float:
    """Return the sum of absolute differences between all pairs of groups, over rates; NaN groups are left out.

    ``{"true_positive_rate": [...]}`` gives FairBranch's EP (equal opportunity), adding the false positive rate its EO. For
    two groups a rate's term is ``|r_1 - r_2|``; more groups: the sum over pairs (ours).

    >>> round(violation({"true_positive_rate": [0.9, 0.7], "false_positive_rate": [0.1, 0.2]}), 9)
    0.3
    """
    total = 0.0
    for values in rates.values():
        known = as_floats(list(values))
        known = known[~np.isnan(known)]
        total += float(np.abs(known[:, None] - known).sum() / 2)
    return total


def paired_difference(
    method: Any, baseline: Any, *, confidence: float = 0.95, n_bootstrap: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Return the mean difference method - baseline over paired seeds, with a bootstrap interval.

    Expanded percentile bootstrap over pairs (Hesterberg, The American Statistician 2015): plain percentiles are too narrow
    by a third at 5 seeds. It never leaves the range of the differences seen; with one pair it is unknown (NaN).

    Returns
    -------
    dict with mean, low, high, sd (of the differences) and n.

    Raises
    ------
    DataError : the two have different numbers of seeds.

    >>> paired_difference([0.9, 0.8], [0.8, 0.7])["n"]
    2.0
    """
    a, b = as_floats(method), as_floats(baseline)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(
            f"paired differences need one value a seed of both methods, found shapes {a.shape} and {b.shape}"
        )
    change = (a - b)[~np.isnan(a - b)]
    n = len(change)
    if n < 2:
        return {"mean": _mean(change), "low": np.nan, "high": np.nan, "sd": np.nan, "n": float(n)}
    mean, sd = float(change.mean()), float(change.std(ddof=1))
    low, high = _expanded_percentile(change, confidence, n_bootstrap, seed)
    return {"mean": mean, "low": low, "high": high, "sd": sd, "n": float(n)}


def _expanded_percentile(change: Floats, confidence: float, n_bootstrap: int, seed: int) -> tuple[float, float]:
    n = len(change)
    means = change[np.random.default_rng(seed).integers(0, n, (n_bootstrap, n))].mean(1)
    # Few seeds: the plain percentiles are too narrow; take those that Student's t and n / (n - 1) ask for.
    tail = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _gain(what: str, multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    if set(multi) != set(single):
        raise DataError(f"{what} needs both models of the same tasks, found {sorted(multi)} and {sorted(single)}")
    return {task: float(multi[task]) - float(single[task]) for task in multi}


def _table(results: Results, metrics: Sequence[str]) -> dict[str, Floats]:
    for method, values in results.items():
        lacking = [m for m in metrics if m not in values]
        if lacking:
            raise DataError(f"method {method!r} lacks {', '.join(lacking)}; every method needs the same metrics")
    return {method: as_floats([values[m] for m in metrics]) for method, values in results.items()}


def _signs(metrics: Mapping[str, Any], higher_is_better: Mapping[str, bool] | bool) -> Floats:
    if isinstance(higher_is_better, bool):
        return np.full(len(metrics), 1.0 if higher_is_better else -1.0)
    lacking = [m for m in metrics if m not in higher_is_better]
    if lacking:
        raise DataError(f"higher_is_better does not say which way {', '.join(lacking)} goes")
    return np.array([1.0 if higher_is_better[m] else -1.0 for m in metrics])


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
