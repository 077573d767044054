"""Expected excess of score gaps over *all* pairs of examples, in O(n log n) (ours)."""

from __future__ import annotations

import numpy as np

from libmtl_fair.metrics.arrays import Floats


class SortedScores:
    """Scores of one task, sorted, with prefix sums: all that the exact audit needs."""

    def __init__(self, scores: Floats) -> None:
        """Sort once; every task pair reuses it."""
        self.values = np.sort(scores)
        self.prefix = np.concatenate([[0.0], np.cumsum(self.values)])


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
