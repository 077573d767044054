"""From confusion tables to the noise of their rates: sizes, shares and common random numbers; no row is read again."""

from __future__ import annotations

import numpy as np

from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.intervals import GroupNoise
from libmtl_fair.metrics.rates import DENOMINATOR, NUMERATOR, divide


def rate_noise(tables: Floats, rates: Floats, overall: Floats, noise: Floats) -> GroupNoise:
    """Return the noise of all rates: one problem for each of :data:`RATES`, one component each.

    ``tables`` [3, G, 4] hold rows, weights and squared weights; ``rates`` [8, G] and ``overall`` [8] are what
    :func:`table_rates` gives; ``noise`` [1, 1, G, R] are standard normal.
    """
    weight = tables[1] @ DENOMINATOR.T
    shares = np.nan_to_num(divide(weight, weight.sum(0))).T
    return GroupNoise(rates[:, None], noise, overall[:, None], shares[:, None], effective_sizes(tables).T[:, None])


def effective_sizes(tables: Floats) -> Floats:
    """Return the number of unweighted rows [..., 8] that would leave each rate as uncertain as the weighted ones do.

    The linearised variance of a weighted rate is ((1 - p)^2 A + p^2 B) / W^2 with A and B the sums of squared weights of its
    hits and misses and W the sum of weights; the size is p (1 - p) over it, for an interior p, else W^2 / (A + B).
    """
    _, weights, squares = tables
    total, hits = weights @ DENOMINATOR.T, squares @ NUMERATOR.T
    misses = squares @ DENOMINATOR.T - hits
    rate = np.nan_to_num(divide(weights @ NUMERATOR.T, total))
    kish = np.nan_to_num(divide(total**2, hits + misses))
    size = np.nan_to_num(divide(rate * (1 - rate) * total**2, (1 - rate) ** 2 * hits + rate**2 * misses))
    return np.where(size > 0, size, kish)


def join(problems: list[list[int]], data: GroupNoise, noise: Floats) -> GroupNoise:
    """Return new problems made of several one-component problems of ``data``; ``noise`` is [1, K, G, R]."""
    index = np.array(problems)
    assert data.sizes is not None
    return GroupNoise(data.values[index, 0], noise, data.centre[index, 0], data.shares[index, 0], data.sizes[index, 0])
