"""Group metrics of classification tasks, from confusion tables: rows of the long table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.bootstrap import effective_sizes, rate_noise
from libmtl_fair.metrics.gap_rows import GapWriter
from libmtl_fair.metrics.group_auc import GroupAuc
from libmtl_fair.metrics.intervals import GroupNoise, wilson
from libmtl_fair.metrics.rates import FPR, RATES, TPR, table_rates

_N = len(RATES)
_ALIASES = {"selection_rate": ("demographic_parity",), "true_positive_rate": ("equal_opportunity",)}
_SELECTION, _ACCURACY = RATES.index("selection_rate"), RATES.index("accuracy")


def binary_rows(writer: GapWriter, tables: Floats) -> None:
    """Write everything that one confusion table per group, ``tables`` [3, G, 4], gives for a binary task."""
    data = label_rows(writer, tables[:, None], [""])
    writer.joined("equalized_odds_mean", data, [TPR, FPR], "mean")


def label_rows(writer: GapWriter, tables: Floats, suffixes: Sequence[str]) -> GroupNoise:
    """Write rates, their gaps and equalised odds of each label, ``tables`` [3, L, G, 4]; return the rates' noise."""
    _, labels, groups, _ = tables.shape
    rates = table_rates(tables[1], tables[0].sum(-1), writer.options.empty)
    overall = table_rates(tables[1].sum(1), tables[0].sum((1, 2)), writer.options.empty)
    noise = writer.draws(1, groups)
    parts = [rate_noise(tables[:, k], rates[k].T, overall[k], noise) for k in range(labels)]
    data = _stack(parts, noise)
    names = [f"{metric}{suffix}" for suffix in suffixes for metric in RATES]
    aliases = {f"{m}{s}": [f"{alias}{s}" for alias in shown] for m, shown in _ALIASES.items() for s in suffixes}
    _value_rows(writer, names, tables, rates, overall)
    writer.single(names, data, aliases)
    for k, suffix in enumerate(suffixes):
        writer.joined(f"equalized_odds{suffix}", data, [k * _N + TPR, k * _N + FPR], writer.options.agg)
    return data


def class_rows(writer: GapWriter, tables: Floats, suffixes: Sequence[str]) -> None:
    """Write each class one-vs-rest, then parity, opportunity and odds over classes: the worst class, and the mean.

    Equalised odds of a class is aggregated by ``agg``; over classes, ``equalized_odds`` is that of the worst class (with
    ``agg="mean"``: the mean over classes, too) and ``equalized_odds_mean_over_classes`` the mean (ours).
    """
    data = label_rows(writer, tables, suffixes)
    count = len(suffixes)
    for name, index in (("demographic_parity", _SELECTION), ("equal_opportunity", TPR)):
        components = [k * _N + index for k in range(count)]
        writer.joined(name, data, components, "worst_case")
        writer.joined(f"{name}_mean_over_classes", data, components, "mean")
    odds = [k * _N + rate for k in range(count) for rate in (TPR, FPR)]
    agg = writer.options.agg
    writer.joined("equalized_odds", data, odds, agg)
    writer.joined("equalized_odds_mean_over_classes", data, odds, "mean", inner=2 if agg == "worst_case" else 1)


def accuracy_rows(writer: GapWriter, correct: Floats) -> None:
    """Write a multiclass task's accuracy, from tables [3, G, 2] of wrong and right rows."""
    tables = np.zeros((*correct.shape[:2], 4))
    tables[..., [2, 3]] = correct
    rates, overall = table_rates(tables[1]), table_rates(tables[1].sum(0))
    keep = [_ACCURACY]
    noise = rate_noise(tables, rates.T, overall, writer.draws(1, tables.shape[1]))
    data = _stack([noise], noise.noise, keep)
    _value_rows(writer, ["accuracy"], tables[:, None], rates[None], overall[None], keep)
    writer.single(["accuracy"], data)


def auc_rows(writer: GapWriter, name: str, found: GroupAuc, overall: GroupAuc) -> None:
    """Write the AUC of each group, with DeLong intervals, and its gaps."""
    value, error = found.value, found.error
    normal_rows(writer, name, value, error, float(overall.value[0]), float(overall.error[0]), (0.0, 1.0))
    shares = np.where(np.isnan(value), 0.0, writer.rows.counts)
    write_normal_gaps(writer, [name], value[None], error[None], overall.value, shares[None], (0.0, 1.0))


def write_normal_gaps(
    writer: GapWriter,
    names: Sequence[str],
    values: Floats,
    errors: Floats,
    overall: Floats,
    shares: Floats,
    bounds: tuple[float, float],
) -> None:
    """Write gaps of values [P, G] whose errors are normal with standard errors [P, G]."""
    known = np.where(np.isnan(errors), 0.0, errors)
    weight = shares / np.maximum(shares.sum(-1, keepdims=True), 1)
    noise = writer.draws(1, values.shape[-1])
    data = GroupNoise(values[:, None], noise, overall[:, None], weight[:, None], error=known[:, None], bounds=bounds)
    writer.single(names, data)


def normal_rows(
    writer: GapWriter,
    name: str,
    value: Floats,
    error: Floats,
    overall: float,
    overall_error: float,
    bounds: tuple[float, float],
) -> None:
    """Write a value per group, with intervals that are normal but for bounds."""
    confidence = writer.options.confidence
    z = np.nan if confidence is None else float(ndtri((1 + confidence) / 2))
    writer.rows.add_groups(name, value, np.clip(value - z * error, *bounds), np.clip(value + z * error, *bounds))
    ends = np.clip([overall - z * overall_error, overall + z * overall_error], *bounds)
    writer.rows.add_overall(name, overall, *ends)


def _stack(parts: Sequence[GroupNoise], noise: Floats, keep: Sequence[int] | None = None) -> GroupNoise:
    index = slice(None) if keep is None else list(keep)
    fields = [np.concatenate([getattr(p, f)[index] for p in parts]) for f in ("values", "centre", "shares", "sizes")]
    return GroupNoise(fields[0], noise, fields[1], fields[2], fields[3])


def _value_rows(
    writer: GapWriter,
    names: Sequence[str],
    tables: Floats,
    rates: Floats,
    overall: Floats,
    keep: Sequence[int] | None = None,
) -> None:
    """Write rates [L, G, 8] of each group and overall [L, 8], with Wilson intervals on effective sizes."""
    index = list(range(_N)) if keep is None else list(keep)
    confidence = writer.options.confidence
    level = 0.95 if confidence is None else confidence
    low, high = wilson(rates, effective_sizes(tables), level)
    all_low, all_high = wilson(overall, effective_sizes(tables.sum(2)), level)
    if confidence is None:
        low, high, all_low, all_high = (np.full_like(v, np.nan) for v in (low, high, all_low, all_high))
    for row, name in enumerate(names):
        k, m = divmod(row, len(index))
        i = index[m]
        writer.rows.add_groups(name, rates[k, :, i], low[k, :, i], high[k, :, i])
        writer.rows.add_overall(name, overall[k, i], all_low[k, i], all_high[k, i])
