"""Rates per group from confusion tables, and their differences and ratios, with fairlearn's names and conventions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.metrics.arrays import Bools, Floats, Ints
from libmtl_fair.metrics.counts import group_counts

Method = Literal["between_groups", "to_overall"]
Aggregate = Literal["worst_case", "mean"]
Empty = Literal["missing", "fairlearn"]

RATES = (
    "selection_rate",
    "true_positive_rate",
    "false_positive_rate",
    "true_negative_rate",
    "false_negative_rate",
    "accuracy",
    "base_rate",
    "precision",
)
"""Rates that every binary table gives, in the order of their columns."""

# A rate is a ratio of sums over the cells (tn, fp, fn, tp) of the confusion table.
NUMERATOR: Floats = np.array(
    [[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
    dtype=np.float64,
)
DENOMINATOR: Floats = np.array(
    [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]],
    dtype=np.float64,
)
TPR, FPR = RATES.index("true_positive_rate"), RATES.index("false_positive_rate")
# fairlearn and scikit-learn score a conditional rate without denominator 0; a mean over no weight stays undefined.
_CONDITIONAL: Bools = DENOMINATOR.sum(1) < 4


def check_option(what: str, value: str, options: tuple[str, ...]) -> None:
    """Raise RecipeError unless ``value`` is one of ``options``."""
    if value not in options:
        raise RecipeError(unknown(what, value, options))


def divide(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
    """Return the quotient, NaN where the denominator is 0, without warnings."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(denominator != 0, numerator / denominator, np.nan))


def table_rates(tables: Floats, rows: Floats | None = None, empty: str = "missing") -> Floats:
    """Return all :data:`RATES` of confusion tables [..., 4] as [..., 8]; NaN where the denominator is empty.

    With ``empty="fairlearn"`` a conditional rate of a group that has rows (``rows`` > 0) but no denominator is 0.
    """
    rates = divide(tables @ NUMERATOR.T, tables @ DENOMINATOR.T)
    if empty == "fairlearn":
        seen = (tables.sum(-1) if rows is None else rows)[..., None] > 0
        rates = np.where(np.isnan(rates) & seen & _CONDITIONAL, 0.0, rates)
    return rates


def difference(values: Floats, overall: Floats | None = None, method: str = "between_groups") -> Floats:
    """Return the largest absolute difference over the last axis (groups), NaN groups left out; NaN if all are.

    >>> difference(np.array([0.2, np.nan, 0.5])).item()
    0.3
    """
    top, bottom = extremes(values)
    if method == "between_groups" or overall is None:
        return np.asarray(top - bottom)
    return np.asarray(np.maximum(np.abs(top - overall), np.abs(bottom - overall)))


def ratio(values: Floats, overall: Floats | None = None, method: str = "between_groups") -> Floats:
    """Return the smallest ratio over the last axis: min / max, or to the overall value, inverted where above 1.

    >>> ratio(np.array([0.2, np.nan, 0.5])).item()
    0.4
    """
    top, bottom = extremes(values)
    if method == "between_groups" or overall is None:
        return divide(bottom, top)
    both = np.stack([divide(bottom, overall), divide(top, overall)])
    with np.errstate(divide="ignore"):
        both = np.where(both > 1, 1 / both, both)
    return nan_reduce(np.minimum, both, axis=0)


def extremes(values: Floats) -> tuple[Floats, Floats]:
    """Return (max, min) over the last axis, NaN left out."""
    return nan_reduce(np.maximum, values), nan_reduce(np.minimum, values)


def nan_reduce(ufunc: np.ufunc, values: Floats, axis: int = -1) -> Floats:
    """Reduce by ``maximum`` or ``minimum`` without NaN and without its warning; NaN if there is nothing else."""
    fill = -np.inf if ufunc is np.maximum else np.inf
    missing = np.isnan(values)
    if values.size and not missing.any():
        return np.asarray(ufunc.reduce(values, axis=axis))
    found = ufunc.reduce(np.where(missing, fill, values), axis=axis, initial=fill)
    return np.asarray(np.where(missing.all(axis=axis), np.nan, found))


def combine(parts: Floats, agg: str, worst: np.ufunc) -> Floats:
    """Return the worst (``maximum`` of differences, ``minimum`` of ratios) or mean over the last axis, NaN left out."""
    if agg == "worst_case":
        return nan_reduce(worst, parts)
    seen = ~np.isnan(parts)
    return divide(np.where(seen, parts, 0).sum(-1), seen.sum(-1))


@dataclass(frozen=True)
class GroupRates:
    """Confusion tables of G groups and everything that follows from them.

    Attributes
    ----------
    counts : [G, 4] true negatives, false positives, false negatives, true positives (or sums of weights).
    empty : ``"missing"``: a rate without denominator is NaN and drops out; ``"fairlearn"``: it is 0, as in fairlearn.
    """

    counts: Floats | Ints
    empty: Empty = "missing"
    _known: dict[str, tuple[Floats, Floats]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def values(self) -> Floats:
        """All rates, [8, G], in the order of :data:`RATES`."""
        return np.ascontiguousarray(table_rates(np.asarray(self.counts, dtype=np.float64), empty=self.empty).T)

    @cached_property
    def overall_values(self) -> Floats:
        """All rates of all groups together, [8]."""
        return table_rates(np.asarray(self.counts, dtype=np.float64).sum(0), empty=self.empty)

    def rate(self, metric: str) -> Floats:
        """Return one rate per group, [G]."""
        return np.asarray(self.values[_index(metric)])

    def overall(self, metric: str) -> float:
        """Return one rate of all groups together."""
        return float(self.overall_values[_index(metric)])

    def difference(self, metric: str, method: Method = "between_groups") -> float:
        """Return the difference of one rate between groups (``demographic_parity`` is that of the selection rate)."""
        return float(self._gaps(method)[0][_index(metric)])

    def ratio(self, metric: str, method: Method = "between_groups") -> float:
        """Return the ratio of one rate between groups."""
        return float(self._gaps(method)[1][_index(metric)])

    def equalized_odds_difference(self, agg: Aggregate = "worst_case", method: Method = "between_groups") -> float:
        """Return the greater (or the mean) of the TPR and FPR differences."""
        check_option("agg", agg, ("worst_case", "mean"))
        return float(combine(self._gaps(method)[0][[TPR, FPR]], agg, np.maximum))

    def equalized_odds_ratio(self, agg: Aggregate = "worst_case", method: Method = "between_groups") -> float:
        """Return the smaller (or the mean) of the TPR and FPR ratios."""
        check_option("agg", agg, ("worst_case", "mean"))
        return float(combine(self._gaps(method)[1][[TPR, FPR]], agg, np.minimum))

    def _gaps(self, method: str) -> tuple[Floats, Floats]:
        """Return differences and ratios of all rates, [8] each, computed once a method."""
        found = self._known.get(method)
        if found is None:
            check_option("method", method, ("between_groups", "to_overall"))
            overall = None if method == "between_groups" else self.overall_values
            found = (difference(self.values, overall, method), ratio(self.values, overall, method))
            self._known[method] = found
        return found


_ALIASES = {"demographic_parity": "selection_rate", "equal_opportunity": "true_positive_rate"}


def _index(metric: str) -> int:
    name = _ALIASES.get(metric, metric)
    check_option("rate", name, RATES)
    return RATES.index(name)


def group_rates(
    y_true: Any, y_pred: Any, groups: Any, n_groups: int, sample_weight: Any = None, empty: Empty = "missing"
) -> GroupRates:
    """Return rates per group, their differences and ratios, from arrays or CPU tensors, in one pass.

    >>> rates = group_rates([1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], n_groups=2)
    >>> rates.equalized_odds_difference(), rates.difference("demographic_parity")
    (1.0, 1.0)
    """
    check_option("rule for empty", empty, ("missing", "fairlearn"))
    return GroupRates(group_counts(y_true, y_pred, groups, n_groups, sample_weight), empty)
