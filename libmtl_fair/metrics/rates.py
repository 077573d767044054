"""Rates per group from confusion tables, and their differences and ratios, with fairlearn's names and conventions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from libmtl_fair.arrays import (
    Array,
    Bools,
    Floats,
    Ints,
    Values,
    as_decisions,
    as_floats,
    as_ids,
    as_numpy,
    as_weights,
    divide,
)
from libmtl_fair.data.frames import group_ids
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.faults import need_few_groups

Method = Literal["between_groups", "to_overall"]
Aggregate = Literal["worst_case", "mean"]
Empty = Literal["missing", "fairlearn"]

# A rate is a ratio of sums over the cells (tn, fp, fn, tp) of the confusion table.
_SUMS = {
    "selection_rate": ([0, 1, 0, 1], [1, 1, 1, 1]),
    "true_positive_rate": ([0, 0, 0, 1], [0, 0, 1, 1]),
    "false_positive_rate": ([0, 1, 0, 0], [1, 1, 0, 0]),
    "true_negative_rate": ([1, 0, 0, 0], [1, 1, 0, 0]),
    "false_negative_rate": ([0, 0, 1, 0], [0, 0, 1, 1]),
    "accuracy": ([1, 0, 0, 1], [1, 1, 1, 1]),
    "base_rate": ([0, 0, 1, 1], [1, 1, 1, 1]),
    "precision": ([0, 0, 0, 1], [0, 1, 0, 1]),
}
RATES = tuple(_SUMS)
"""Rates that every binary table gives, in the order of their columns."""
NUMERATOR, DENOMINATOR = np.array(list(_SUMS.values()), dtype=np.float64).swapaxes(0, 1)
ALIASES = {"demographic_parity": "selection_rate", "equal_opportunity": "true_positive_rate"}
"""Names of fairness -> the rate that they compare."""

TPR, FPR = RATES.index("true_positive_rate"), RATES.index("false_positive_rate")
# fairlearn and scikit-learn score a conditional rate without denominator 0; a mean over no weight stays undefined.
_CONDITIONAL: Bools = DENOMINATOR.sum(1) < 4
_CHUNK = 1 << 16
"""Rows that are packed at a time: the codes stay in the cache, and extra memory does not grow with n."""


def check_option(what: str, value: str, options: tuple[str, ...]) -> None:
    """Raise RecipeError unless ``value`` is one of ``options``."""
    if value not in options:
        raise RecipeError(unknown(what, value, options))


def group_counts(
    y_true: Values, y_pred: Values, groups: Values, n_groups: int, sample_weight: Values | None = None
) -> Ints | Floats:
    """Return the confusion table of every group, [G, 4]: true negatives, false positives, false negatives, true positives.

    ``y_true`` and ``y_pred`` are 0/1 (any dtype), ``groups`` ids in -1..G-1; rows of unknown group (-1) are left out.
    Linear in n and independent of G; int64 counts, or float64 sums of ``sample_weight``.
    """
    y, p = as_decisions(y_true, "y_true"), as_decisions(y_pred, "y_pred")
    g = as_ids(as_numpy(groups).reshape(-1))
    need_few_groups("groups", n_groups)
    if not len(y) == len(p) == len(g):
        raise DataError(f"y_true, y_pred and groups must have one length, found {len(y)}, {len(p)} and {len(g)}")
    weight = None if sample_weight is None else as_weights(sample_weight, len(y))
    size = 4 * (n_groups + 1)
    total: Array = np.zeros(size, dtype=np.int64 if weight is None else np.float64)
    for start in range(0, len(y), _CHUNK):
        rows = slice(start, start + _CHUNK)
        codes = _pack(y[rows], p[rows], g[rows], n_groups)
        total += np.bincount(codes, None if weight is None else weight[rows], minlength=size)
    return np.asarray(total.reshape(n_groups + 1, 4)[1:])


def _pack(y: Array, p: Array, g: Array, n_groups: int) -> Ints:
    if not (_is_binary(y) and _is_binary(p)):
        raise DataError(
            "y_true and y_pred must hold 0 and 1 only; leave out missing labels (NaN, -100) before counting"
        )
    low, high = g.min(), g.max()
    if low < -1 or high >= n_groups:
        raise DataError(f"group ids must lie in -1..{n_groups - 1} for n_groups={n_groups}, found {low} to {high}")
    codes = np.add(g, 1, casting="unsafe", dtype=np.int64)
    for bit in (y, p):
        codes += codes
        np.add(codes, bit, out=codes, casting="unsafe")
    return codes


def _is_binary(values: Array) -> bool:
    if values.dtype.kind == "f":
        return bool(((values == 0) | (values == 1)).all())
    # Seen as unsigned, a negative number is huge: one pass instead of two.
    return bool(values.view(f"u{values.dtype.itemsize}").max() <= 1)


def table_rates(tables: Floats, rows: Floats | None = None, empty: str = "missing") -> Floats:
    """Return all :data:`RATES` of confusion tables [..., 4] as [..., 8]; without denominator NaN, or 0 as ``empty`` says."""
    rates = divide(tables @ NUMERATOR.T, tables @ DENOMINATOR.T)
    if empty == "fairlearn":
        seen = (tables.sum(-1) if rows is None else rows)[..., None] > 0
        rates = np.where(np.isnan(rates) & seen & _CONDITIONAL, 0.0, rates)
    return rates


def gaps(values: Floats, overall: Floats | None = None) -> tuple[Floats, Floats]:
    """Return the largest absolute difference and the smallest ratio over the last axis (groups), NaN groups left out.

    Between groups, or each to its ``overall`` value where given (ratios above 1 are inverted); NaN if all groups are.
    """
    top, bottom = nan_reduce(np.maximum, values), nan_reduce(np.minimum, values)
    if overall is None:
        return np.asarray(top - bottom), divide(bottom, top)
    both = np.stack([divide(bottom, overall), divide(top, overall)])
    with np.errstate(divide="ignore"):
        both = np.where(both > 1, 1 / both, both)
    return np.maximum(np.abs(top - overall), np.abs(bottom - overall)), nan_reduce(np.minimum, both, axis=0)


def nan_reduce(ufunc: np.ufunc, values: Floats, axis: int = -1) -> Floats:
    """Reduce by ``maximum`` or ``minimum`` without NaN and without its warning; NaN if there is nothing else."""
    missing = np.isnan(values)
    if values.size and not missing.any():
        return np.asarray(ufunc.reduce(values, axis=axis))
    fill = -np.inf if ufunc is np.maximum else np.inf
    found = ufunc.reduce(np.where(missing, fill, values), axis=axis, initial=fill)
    return np.asarray(np.where(missing.all(axis=axis), np.nan, found))


def combine(parts: Floats, agg: str, worst: np.ufunc) -> Floats:
    """Return the worst (``maximum`` of differences, ``minimum`` of ratios) or mean over the last axis, NaN left out."""
    check_option("agg", agg, ("worst_case", "mean"))
    if agg == "worst_case":
        return nan_reduce(worst, parts)
    seen = ~np.isnan(parts)
    return divide(np.where(seen, parts, 0).sum(-1), seen.sum(-1))


@dataclass(frozen=True)
class GroupRates:
    """Confusion tables of G groups, ``counts`` [G, 4] (tn, fp, fn, tp), and everything that follows from them.

    ``names`` are the groups' where they were labels.
    A rate without denominator is NaN and drops out, or with ``empty="fairlearn"`` 0, as there.
    """

    counts: Floats | Ints
    empty: Empty = "missing"
    names: tuple[str, ...] = ()
    _known: dict[str, tuple[Floats, Floats]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def values(self) -> Floats:
        """All rates, [8, G], in the order of :data:`RATES`."""
        return np.ascontiguousarray(table_rates(as_floats(self.counts), empty=self.empty).T)

    @cached_property
    def overall_values(self) -> Floats:
        """All rates of all groups together, [8]."""
        return table_rates(as_floats(self.counts).sum(0), empty=self.empty)

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
        return float(combine(self._gaps(method)[0][[TPR, FPR]], agg, np.maximum))

    def equalized_odds_ratio(self, agg: Aggregate = "worst_case", method: Method = "between_groups") -> float:
        """Return the smaller (or the mean) of the TPR and FPR ratios."""
        return float(combine(self._gaps(method)[1][[TPR, FPR]], agg, np.minimum))

    def _gaps(self, method: str) -> tuple[Floats, Floats]:
        """Return differences and ratios of all rates, [8] each, computed once a method."""
        if method not in self._known:
            check_option("method", method, ("between_groups", "to_overall"))
            self._known[method] = gaps(self.values, None if method == "between_groups" else self.overall_values)
        return self._known[method]


def _index(metric: str) -> int:
    check_option("rate", name := ALIASES.get(metric, metric), RATES)
    return RATES.index(name)


def group_rates(
    y_true: Values,
    y_pred: Values,
    groups: Values,
    n_groups: int | None = None,
    sample_weight: Values | None = None,
    empty: Empty = "missing",
) -> GroupRates:
    """Return rates per group, their differences and ratios, from arrays, columns of any library or CPU tensors, in one pass.

    Parameters
    ----------
    y_true, y_pred : Values
        0 or 1, [N].
    groups : Values
        Ids 0..G-1 [N], -1 unknown; or labels (text, truth values), whose groups are in the order of their sorted names.
    n_groups : int, optional
        G; without it as many as occur.
    sample_weight : Values, optional
        Of at least 0, [N].
    empty : Empty, default "missing"
        What a rate without denominator is: NaN, or 0 as in ``"fairlearn"``.

    Raises
    ------
    DataError
        Lengths differ, values that are not 0 or 1, or ids outside of -1..G-1.

    Examples
    --------
    >>> rates = group_rates([1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], n_groups=2)
    >>> rates.equalized_odds_difference(), rates.difference("demographic_parity")
    (1.0, 1.0)
    >>> group_rates([1, 0, 1, 0], [1, 1, 0, 0], ["m", "m", "f", "f"]).names
    ('f', 'm')
    """
    check_option("rule for empty", empty, ("missing", "fairlearn"))
    ids, names = (groups, None) if isinstance(groups, Tensor) else group_ids(groups, "groups")
    if n_groups is None:
        n_groups = len(names) if names is not None else int(as_ids(ids).max(initial=-1)) + 1
    return GroupRates(group_counts(y_true, y_pred, ids, n_groups, sample_weight), empty, tuple(names or ()))
