"""AUC of every group for many scores of any dtype: sorted in place by group and label, in about 20 bytes a row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.metrics.arrays import Floats, Ints

CHUNK = 1 << 15


def segments(score: NDArray[Any], label: NDArray[Any], group: NDArray[Any], n_groups: int) -> tuple[NDArray[Any], Ints]:
    """Return the scores ordered by group, label and value, and where each (group, label) starts, [2 G + 1]."""
    code = _codes(label, group, n_groups)
    edges = np.zeros(2 * n_groups + 1, dtype=np.int64)
    np.cumsum(np.bincount(code, minlength=2 * n_groups), out=edges[1:])
    order = np.argsort(code, kind="stable")  # linear in n for 16-bit codes
    del code
    held = score[order]
    del order
    for start, end in pairwise(edges):
        held[start:end].sort()
    return held, edges


def _codes(label: NDArray[Any], group: NDArray[Any], n_groups: int) -> NDArray[Any]:
    code = np.empty(len(group), dtype=np.uint16 if 2 * n_groups <= 1 << 16 else np.int64)
    for start in range(0, len(group), CHUNK):
        part = slice(start, start + CHUNK)
        code[part] = 2 * group[part].astype(np.int64) + (label[part] > 0)
    return code


def placements(held: NDArray[Any], edges: Ints, errors: bool) -> tuple[Floats, Floats]:
    """Return how many (positive, negative) pairs of each group are in order, [G], and squared placements, [2, G].

    Ties count half. A placement (DeLong) is the number of negatives below a positive, or of positives above a negative;
    their squares are summed over positives and over negatives (zeros without ``errors``).
    """
    n_groups = len(edges) // 2
    pairs, squares = np.zeros(n_groups), np.zeros((2, n_groups))
    for g in range(n_groups):
        negatives, positives = held[edges[2 * g] : edges[2 * g + 1]], held[edges[2 * g + 1] : edges[2 * g + 2]]
        pairs[g], squares[0, g] = _below(positives, negatives, errors)
        if errors:
            squares[1, g] = _below(negatives, positives, errors, above=True)[1]
    return pairs, squares


def _below(values: NDArray[Any], others: NDArray[Any], squared: bool, above: bool = False) -> tuple[float, float]:
    """Return the sum over ``values`` of the number of ``others`` below (or above), ties half, and the sum of squares."""
    total, square = 0.0, 0.0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        low = int(np.searchsorted(others, part[0], side="left"))
        high = int(np.searchsorted(others, part[-1], side="right"))
        near = others[low:high]
        left = np.searchsorted(near, part, side="left")
        tied = np.flatnonzero(near[np.minimum(left, len(near) - 1)] == part) if len(near) else left[:0]
        below = left + float(low)
        below[tied] += 0.5 * (np.searchsorted(near, part[tied], side="right") - left[tied])
        if above:
            below = len(others) - below
        total += float(below.sum())
        square += float(below @ below) if squared else 0.0
    return total, square
