"""Ranks of one task's scores among reference scores, and what near pairs say of them: METHODS.md, 1.3 (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

from libmtl_fair.arrays import Array, Floats, Values, as_floats
from libmtl_fair.errors import DataError
from libmtl_fair.metrics.near_pairs import NearPairs

Scores: TypeAlias = Mapping[str, Values]
LIMITS = (0.1, 0.3)
LEAST_GINI = 0.05
"""A task whose ranks differ by less than this in the mean of any two people is undefined."""


class RankedTask:
    """Ranks [C, N] of one task's scores, a row each class; ``weights`` of the classes, ``gini`` [C], decisions, why undefined.

    Arguments as :meth:`ConsistencyAudit.run` has them, of one task.
    """

    def __init__(
        self,
        name: str,
        scores: Floats,
        base: Floats,
        labels: Values | None,
        threshold: float | None,
        decided: Values | None,
    ) -> None:
        self.name, self.bar = name, threshold
        columns, base = np.atleast_2d(scores.T), np.atleast_2d(base.T)
        if len(base) != len(columns):
            raise DataError(f"reference_scores of task {name!r} have {len(base)} columns, its scores {len(columns)}")
        self.base = [np.sort(column[np.isfinite(column)]) for column in base]
        if not all(map(len, self.base)):
            raise DataError(f"reference_scores of task {name!r} hold no finite score")
        self.ranks = self.ranked(columns)
        seen = np.isfinite(self.ranks).all(0)
        self.gini = np.array([gini(row[seen]) for row in self.ranks])
        known = None if labels is None else as_floats(labels)
        weights = _shares(base, known) * (self.gini >= LEAST_GINI)
        self.weights = weights / weights.sum() if weights.any() else weights
        distinct = max(len(np.unique(column[seen])) for column in columns) if seen.any() else 0
        self.undefined = ""
        if distinct < 2:
            self.undefined = "one distinct score" if distinct else "no finite score"
        elif not weights.any():
            self.undefined = f"ranks hardly differ (mean difference {self.gini.max():.3f}, under {LEAST_GINI:g})"
        self.factors = np.divide(self.weights, self.gini, out=np.zeros(len(self.gini)), where=self.weights > 0)
        self.given = None if decided is None else as_floats(decided)
        self.decided = self.decide(columns) if self.given is None else self.given
        self.rate = self._rate(base[0], known) if len(columns) == 1 else None

    def ranked(self, columns: Floats) -> Floats:
        """Return mid-ranks among the reference scores, in [0, 1]; NaN for a score that is not finite."""
        found = []
        for column, base in zip(columns, self.base):
            below, up_to = (np.searchsorted(base, column, side=side) for side in ("left", "right"))
            found.append(np.where(np.isfinite(column), (below + up_to) / (2 * len(base)), np.nan))
        return np.array(found)

    def decide(self, columns: Floats) -> Floats | None:
        """Return decisions [N]: whether a score is above the threshold, or the likeliest class; None where there is none."""
        seen = np.isfinite(columns).all(0)
        if len(columns) > 1:
            return np.where(seen, np.nan_to_num(columns).argmax(0), np.nan)
        outside = seen & ((columns[0] < 0) | (columns[0] > 1))
        return None if self.bar is None or outside.any() else np.where(seen, columns[0] > self.bar, np.nan)

    def _rate(self, base: Floats, labels: Floats | None) -> Floats | None:
        """Return the rate of positives at each person's rank, by isotonic regression; None without labels of 0 and 1."""
        from sklearn.isotonic import IsotonicRegression

        if labels is None or labels.shape != base.shape:
            return None
        seen = np.isfinite(base) & np.isfinite(labels) & (labels >= 0)
        if not seen.any() or set(np.unique(labels[seen])) != {0.0, 1.0}:
            return None
        fitted = IsotonicRegression(out_of_bounds="clip").fit(self.ranked(base[None])[0][seen], labels[seen])
        found = np.full(self.ranks.shape[1], np.nan)
        known = np.isfinite(self.ranks[0])
        found[known] = fitted.predict(self.ranks[0][known])
        return found

    def gaps(self, pairs: NearPairs) -> Floats:
        """Return |r(x) - r(y)| / G of every near pair, [A, k], averaged with class shares; NaN where undefined.

        Pairs with a score that is not finite are left out: the others are spread about the mean so that mean and error stay right.
        """
        if self.undefined:
            return np.full(pairs.neighbours.shape, np.nan)
        found = np.zeros(pairs.neighbours.shape)
        for factor, row in zip(self.factors, self.ranks):
            found += factor * apart(pairs, row)
        if (seen := np.isfinite(found)).all() or not seen.any():
            return found
        value = mean_known(found)
        return np.asarray(np.where(seen, found - value, 0.0) / seen.mean() + value)

    def measured(self, pairs: NearPairs) -> dict[str, float]:
        """Return Ic, V at both limits, D, the share selected and G."""
        found = {"calibrated": math.nan}
        if self.rate is not None and not self.undefined:
            spread = gini(self.rate[np.isfinite(self.rate)])
            found["calibrated"] = mean_known(apart(pairs, self.rate)) / spread if spread > 0 else math.nan
        used = [] if self.undefined else np.flatnonzero(self.weights).tolist()
        gaps = [apart(pairs, self.ranks[c]) for c in used]
        for limit in LIMITS:
            above = [self.weights[c] * np.mean(each[np.isfinite(each)] > limit) for c, each in zip(used, gaps)]
            found[f"violation_{limit:g}"] = float(sum(above)) if used else math.nan
        found |= {"decisions": math.nan, "selected": math.nan}
        if self.decided is not None and len(known := self.decided[np.isfinite(self.decided)]):
            shares = np.unique(known, return_counts=True)[1] / len(known)
            first, second = self.decided[pairs.anchors][:, None], self.decided[pairs.neighbours]
            both = np.isfinite(first) & np.isfinite(second)
            differ, any_two = np.mean((first != second)[both]), 1 - float(shares @ shares)
            found["decisions"] = float(differ) / any_two if len(shares) > 1 else math.nan
            found["selected"] = float(known.mean()) if len(self.ranks) == 1 else math.nan
        return {**found, "gini": float(self.gini[used] @ self.weights[used]) if used else float(self.gini.max())}

    def flip(self, twins: list[Scores]) -> tuple[float, float]:
        """Return F and the share of decisions that change, averaged over people and over the other sensitive values."""
        gaps, changes = [], []
        for each in twins:
            if (values := each.get(self.name)) is None:
                continue
            columns = np.atleast_2d(as_floats(values).T)
            if columns.shape != self.ranks.shape:
                raise DataError(
                    f"twins of task {self.name!r} have shape {list(columns.T.shape)}, its scores {list(self.ranks.T.shape)}"
                )
            gaps.append(self.factors @ np.abs(self.ranks - self.ranked(columns)))
            decided = self.decide(columns) if self.given is None else None
            if decided is not None and self.decided is not None:
                both = np.isfinite(decided) & np.isfinite(self.decided)
                changes.append(np.where(both, decided != self.decided, np.nan))
        return math.nan if self.undefined else _mean_of_people(gaps), _mean_of_people(changes)


def gini(values: Floats) -> float:
    """Return the mean difference |x - y| over all pairs of different people, by one sort; 0 for fewer than two.

    >>> gini(np.array([0.0, 1.0, 3.0]))
    2.0
    """
    n = len(values)
    return float(2 * (np.arange(1 - n, n, 2) @ np.sort(values)) / (n * (n - 1))) if n > 1 else 0.0


def _shares(base: Floats, labels: Floats | None) -> Floats:
    """Return the weight of each column: shares of the labels' classes, else mean probabilities; equal for several labels."""
    if labels is not None and labels.ndim == 1 and len(base) > 1:
        known = labels[np.isfinite(labels) & (labels >= 0)].astype(np.int64)
        if known.size and known.max() < len(base):
            return np.asarray(np.bincount(known, minlength=len(base)) / len(known))
    seen = base[:, np.isfinite(base).all(0)]
    probabilities = len(base) > 1 and (seen >= 0).all() and np.allclose(seen.sum(0), 1, atol=1e-4)
    return np.asarray(seen.mean(1)) if probabilities else np.ones(len(base))


def apart(pairs: NearPairs, values: Floats) -> Floats:
    """Return |value - value| of every near pair, [A, k]."""
    return np.asarray(np.abs(values[pairs.anchors][:, None] - values[pairs.neighbours]))


def mean_known(values: Iterable[float] | Floats) -> float:
    """Return the mean of the finite values; NaN where there is none."""
    known = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else math.nan


def _mean_of_people(values: list[Array]) -> float:
    """Return the mean over people of each one's mean over the twins that they have."""
    if not values:
        return math.nan
    stacked = np.stack(values)
    count = np.isfinite(stacked).sum(0)
    sums = np.nansum(stacked, axis=0)
    return mean_known(sums[count > 0] / count[count > 0])
