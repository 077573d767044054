"""Expected excess of score gaps over *all* pairs of examples, in O(n log n) a task pair or better (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.exact_tables import excess_tables


class SortedScores:
    """Scores of one task, sorted, with prefix sums: all that the exact audit needs."""

    def __init__(self, scores: Floats) -> None:
        """Sort once; every task pair reuses it."""
        self.values = np.sort(scores)
        self.prefix = np.concatenate([[0.0], np.cumsum(self.values)])


def exact_excesses(
    values: Mapping[str, Floats], deltas: Mapping[tuple[int, int], float], names: Sequence[str]
) -> dict[tuple[int, int], tuple[float, float]]:
    """Return (Bias, VR) of every task pair in ``deltas`` (indices into ``names`` -> tolerance), over all their pairs of scores."""
    if len(set(deltas.values())) == 1 and len(values) > 2:
        tables = excess_tables(list(values.values()), next(iter(deltas.values())))
        if tables is not None:
            place = {names.index(task): k for k, task in enumerate(values)}
            many = np.array([len(v) for v in values.values()], dtype=np.float64)
            bias, rate = (((table + table.T) / np.outer(many, many)).tolist() for table in tables)
            return {(i, j): (max(bias[place[i]][place[j]], 0.0), rate[place[i]][place[j]]) for i, j in deltas}
    sorts = {task: SortedScores(v) for task, v in values.items()}
    return {(i, j): exact_excess(sorts[names[i]], sorts[names[j]], delta) for (i, j), delta in deltas.items()}


def exact_excess(a: SortedScores, b: SortedScores, delta: float) -> tuple[float, float]:
    """Return (E[(|p - q| - delta)+], P(|p - q| > delta)) for p, q drawn independently from ``a`` and ``b``.

    For every p the q above p + delta are a tail of the sorted q, and those below p - delta a head; counts come from two
    binary searches and sums from prefix sums. Ties are decided on the float64 values of p + delta and p - delta.
    """
    size = len(b.values)
    upper = a.values[: np.searchsorted(a.values, b.values[-1] - delta, side="right")] + delta
    lower = a.values[np.searchsorted(a.values, b.values[0] + delta, side="left") :] - delta
    head = np.searchsorted(b.values, upper, side="right")
    tail = np.searchsorted(b.values, lower, side="left")
    above = size - head
    excess = b.prefix[-1] * len(upper) - b.prefix[head].sum() - above @ upper + tail @ lower - b.prefix[tail].sum()
    total = len(a.values) * size
    return max(float(excess) / total, 0.0), float(above.sum() + tail.sum()) / total
