"""Group metrics of regression tasks: rows of the long table, in native units."""

from __future__ import annotations

import numpy as np

from libmtl_fair.metrics.arrays import Floats, Ints
from libmtl_fair.metrics.gap_rows import GapWriter
from libmtl_fair.metrics.gaps import Gap
from libmtl_fair.metrics.group_classification import normal_rows, write_normal_gaps
from libmtl_fair.metrics.group_regression import REGRESSION, binned_shares, group_regression, ks_distance
from libmtl_fair.metrics.intervals import GroupNoise, gap_interval

_BOUNDS = {
    "mae": (0.0, np.inf),
    "rmse": (0.0, np.inf),
    "r2": (-np.inf, 1.0),
    "ccc": (-1.0, 1.0),
    "mean_prediction": (-np.inf, np.inf),
    "mean_error": (-np.inf, np.inf),
}
_BINS = 32


def regression_rows(writer: GapWriter, prediction: Floats, target: Floats, group: Ints, weight: Floats | None) -> None:
    """Write every metric of :data:`REGRESSION` and the KS distance; ``group`` [N] holds known ids only."""
    groups = len(writer.rows.names)
    found = group_regression(prediction, target, group, groups, weight)
    every = group_regression(prediction, target, np.zeros_like(group), 1, weight)
    for m, name in enumerate(REGRESSION):
        bounds = _BOUNDS[name]
        value, error = found.values[m], found.errors[m]
        normal_rows(writer, name, value, error, float(every.values[m, 0]), float(every.errors[m, 0]), bounds)
        shares = np.where(np.isnan(value), 0.0, found.counts)
        write_normal_gaps(writer, [name], value[None], error[None], every.values[m], shares[None], bounds)
    _ks_row(writer, prediction, group, found.counts)


def _ks_row(writer: GapWriter, prediction: Floats, group: Ints, counts: Ints) -> None:
    groups = len(counts)
    value, low, high = ks_distance(prediction, group, groups), np.nan, np.nan
    options = writer.options
    if options.intervals and options.confidence is not None and np.isfinite(value):
        shares = binned_shares(prediction, group, groups, _BINS)
        data = _ks_noise(shares, counts, options.n_bootstrap, writer.rng)
        ends = gap_interval(data, Gap(), options.confidence)
        # The bins see a little less than the whole distance: the interval moves with the estimate.
        moved = value - float(np.nanmax(np.nanmax(shares, 1) - np.nanmin(shares, 1)))
        low, high = max(float(ends[0][0]), 0.0), min(float(ends[1][0]) + moved, 1.0)
    among = np.where(counts > 0, 1.0, np.nan)
    writer.rows.add_gap("ks", "difference", value, low, high, among=among)


def _ks_noise(shares: Floats, counts: Ints, n_bootstrap: int, rng: np.random.Generator) -> GroupNoise:
    bins, groups = shares.shape
    known = np.nan_to_num(shares)
    chances = np.diff(known, axis=0, prepend=0.0, append=1.0).T
    drawn = rng.multinomial(counts, np.clip(chances, 0, 1), size=(n_bootstrap, groups))
    errors = drawn.cumsum(-1)[..., :-1] / np.maximum(counts, 1)[:, None] - known.T
    centre = (known * counts).sum(1) / max(counts.sum(), 1)
    weight = np.broadcast_to(counts / max(counts.sum(), 1), (1, bins, groups))
    ones = np.ones((1, bins, groups))
    noise = np.ascontiguousarray(errors.transpose(2, 1, 0))[None]
    return GroupNoise(shares[None], noise, centre[None], weight, error=ones)
