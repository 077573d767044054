"""Comparing methods: Delta_m, mean rank, gains over single tasks, paired differences over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from libmtl_fair.arrays import Floats, Values, as_floats, divide
from libmtl_fair.errors import DataError
from libmtl_fair.metrics.rates import check_option

Results = Mapping[str, Mapping[str, float]]
"""method -> metric (one per task, or several) -> value."""
HigherIsBetter = Mapping[str, bool] | bool


def delta_m(
    results: Results,
    baseline: Mapping[str, float],
    higher_is_better: HigherIsBetter = True,
    *,
    definition: Literal["navon", "glf"] = "navon",
) -> dict[str, float]:
    """Return each method's mean relative change against ``baseline`` in per cent; lower is better (Navon et al., ICML 2022).

    ``Delta_m = 100 / K sum_k (-1)^(s_k) (M_m,k - M_b,k) / |M_b,k|`` with s_k = 1 where higher is better (the source has no bars, where
    a baseline below 0, as R2 may be, would praise what is worse). A metric that is NaN, or 0 in the baseline, leaves the mean of that
    method (NaN if none is left).

    ``definition="glf"`` is the scale of GLF's table, about 3.5 times that: the *sum* of the same changes over two attributes' EOD (mean
    form, ``equalized_odds_mean``), EOpD (``equal_opportunity``) and GAUCD (``auc``), and over AUC, which is one number for both and so
    counts twice (what is better when higher does), divided by 2. A missing metric makes it NaN: a sum over less is another scale.

    Raises
    ------
    DataError
        A method lacks one of the baseline's metrics.
    RecipeError
        No such definition.

    Examples
    --------
    >>> {m: round(v, 9) for m, v in delta_m({"fair": {"auc": 0.81}}, {"auc": 0.9}).items()}
    {'fair': 10.0}
    """
    table, base = _table(results, baseline, higher_is_better), _table({"": baseline}, baseline, higher_is_better)
    check_option("definition", definition, ("navon", "glf"))
    change = divide(base - table, np.abs(as_floats(list(baseline.values())))) * 100
    if definition == "glf":
        weight = np.where(_signs(baseline, higher_is_better) > 0, 2, 1)
        return dict(zip(results, map(float, change @ weight / 2)))
    return dict(zip(results, map(_mean, change)))


def mean_rank(results: Results, higher_is_better: HigherIsBetter = True) -> dict[str, float]:
    """Return each method's rank, averaged over metrics; 1 is best, ties share their mean (Navon et al., ICML 2022).

    A method without a value for a metric ranks last there.

    >>> mean_rank({"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.8, "y": 0.2}})
    {'a': 1.5, 'b': 1.5}
    """
    if not results:
        return {}
    frame = pd.DataFrame(-_table(results, next(iter(results.values())), higher_is_better))
    return dict(zip(results, frame.rank(na_option="bottom").mean(axis=1).astype(float)))


UNIT_SCORES: Mapping[str, Callable[[Floats], Floats]] = {
    "auc": lambda value: value,
    "accuracy": lambda value: value,
    "r2": lambda value: np.clip(value, 0, 1),
    "miou": lambda value: value,
    "rmse": lambda value: 1 / (1 + value),
    "angle": lambda value: 1 - value / 180,
}
"""Kind of metric -> a score in [0, 1] that no other method moves; the angle is in degrees."""


def worst_and_macro(results: Results, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Return each method's worst and mean score over tasks, each score in [0, 1] and fixed, whatever else is compared.

    On NYUv2 they are of mIoU, 1 / (1 + RMSE) of depth and 1 - err / 180 of normals (ReLiF, arXiv:2606.10632); elsewhere the AUC of a
    binary task, the accuracy of a multiclass one and R2, at least 0, of a regression (ours). A task without a value makes both NaN:
    a mean over fewer tasks is another quantity.

    Parameters
    ----------
    results : mapping of str to mapping
        Method -> metric (one per task) -> value.
    kinds : mapping of str to str
        Metric -> ``auc``, ``accuracy``, ``r2``, ``miou``, ``rmse`` or ``angle`` (degrees).

    Raises
    ------
    DataError
        A metric without a kind, or a method that lacks one.
    RecipeError
        No such kind.

    Examples
    --------
    >>> nyu = {"plain": {"segmentation": 0.5, "depth": 0.6, "normals": 27.0}}
    >>> worst_and_macro(nyu, {"segmentation": "miou", "depth": "rmse", "normals": "angle"}).round(3).loc["plain"].tolist()
    [0.5, 0.658]
    """
    metrics = next(iter(results.values()), {})
    if lacking := [name for name in metrics if name not in kinds]:
        raise DataError(f"kinds does not say of what kind {', '.join(lacking)} is: {', '.join(UNIT_SCORES)}")
    for name in metrics:
        check_option("kind", kinds[name], tuple(UNIT_SCORES))
    values = _table(results, metrics, True)
    scores = np.stack([UNIT_SCORES[kinds[name]](values[:, i]) for i, name in enumerate(metrics)], 1)
    return pd.DataFrame({"worst": scores.min(1), "macro": scores.mean(1)}, index=list(results))


def knowledge_gain(multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    """Return KG_t = accuracy of task t in the multi-task model - in its single-task model (FairBranch); >= 0 is good.

    >>> {t: round(v, 9) for t, v in knowledge_gain({"a": 0.9}, {"a": 0.8}).items()}
    {'a': 0.1}
    """
    return _gain("knowledge_gain", multi, single)


def discrimination_gain(multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    """Return DG_t = :func:`violation` (EP or EO) of task t in the multi-task model - in its single-task model; <= 0 is good."""
    return _gain("discrimination_gain", multi, single)


def _gain(what: str, multi: Mapping[str, float], single: Mapping[str, float]) -> dict[str, float]:
    if set(multi) != set(single):
        raise DataError(f"{what} needs both models of the same tasks, found {sorted(multi)} and {sorted(single)}")
    return {task: float(multi[task]) - float(single[task]) for task in multi}


def violation(rates: Mapping[str, Sequence[float]]) -> float:
    """Return the sum of absolute differences between all pairs of groups, over rates; NaN groups are left out.

    ``{"true_positive_rate": [...]}`` gives FairBranch's EP (equal opportunity), adding the false positive rate its EO. For
    two groups a rate's term is ``|r_1 - r_2|``; more groups: the sum over pairs (ours).

    >>> round(violation({"true_positive_rate": [0.9, 0.7], "false_positive_rate": [0.1, 0.2]}), 9)
    0.3
    """
    tables = (as_floats(list(values)) for values in rates.values())
    return float(sum(np.nansum(np.abs(table[:, None] - table)) / 2 for table in tables))


def paired_difference(
    method: Values, baseline: Values, *, confidence: float = 0.95, n_bootstrap: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Return the mean difference method - baseline over paired seeds with a bootstrap interval: mean, low, high, sd, n.

    Expanded percentile bootstrap over pairs (Hesterberg, The American Statistician 2015): plain percentiles are too narrow
    by a third at 5 seeds. It never leaves the range of the differences seen; with one pair it is unknown (NaN).

    Raises
    ------
    DataError
        The two have different numbers of seeds.

    Examples
    --------
    >>> paired_difference([0.9, 0.8], [0.8, 0.7])["n"]
    2.0
    """
    from scipy.special import ndtr, stdtrit

    a, b = as_floats(method), as_floats(baseline)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(
            f"paired differences need one value a seed of both methods, found shapes {a.shape} and {b.shape}"
        )
    change = (a - b)[~np.isnan(a - b)]
    n = len(change)
    low, high, sd = np.nan, np.nan, np.nan
    if n > 1:
        means = change[np.random.default_rng(seed).integers(0, n, (n_bootstrap, n))].mean(1)
        # Few seeds: the plain percentiles are too narrow; take those that Student's t and n / (n - 1) ask for.
        tail = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2)))
        low, high = map(float, np.quantile(means, [tail, 1 - tail]))
        sd = float(change.std(ddof=1))
    return {"mean": _mean(change), "low": low, "high": high, "sd": sd, "n": float(n)}


def _table(results: Results, metrics: Mapping[str, float], higher_is_better: HigherIsBetter) -> Floats:
    """Return the methods' metrics [methods, metrics], negative where lower is better."""
    for method, values in results.items():
        if lacking := [m for m in metrics if m not in values]:
            raise DataError(f"method {method!r} lacks {', '.join(lacking)}; every method needs the same metrics")
    return as_floats([[values[m] for m in metrics] for values in results.values()]) * _signs(metrics, higher_is_better)


def _signs(metrics: Mapping[str, float], higher_is_better: HigherIsBetter) -> Floats:
    """Return 1 for each metric that is better when higher, -1 for the others."""
    better = dict.fromkeys(metrics, higher_is_better) if isinstance(higher_is_better, bool) else higher_is_better
    if lacking := [m for m in metrics if m not in better]:
        raise DataError(f"higher_is_better does not say which way {', '.join(lacking)} goes")
    return as_floats([1.0 if better[m] else -1.0 for m in metrics])


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
