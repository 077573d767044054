"""What confusion counts allow to be said: is a decision one at all, does a gap rest on enough people, is there one, who pays (ours).

Everything here needs the counts of :func:`libmtl_fair.metrics.rates.group_counts` alone, [G, 4] of (tn, fp, fn, tp) for each group,
which :func:`counts_from_rows` recovers from the table of :class:`GroupMetrics`. Source: METHODS.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
import pandas as pd

from libmtl_fair.arrays import Bools, Floats, Values, as_floats, divide
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.metrics.intervals import Gap, gap_interval, normal_width, rate_noise
from libmtl_fair.metrics.rates import ALIASES, DENOMINATOR, FPR, NUMERATOR, RATES, TPR, nan_reduce, table_rates

CELLS = ("tn", "fp", "fn", "tp")
FEWEST, MOST = 0.01, 0.99
"""A decision that selects less, or more, than this share of people is none (ours)."""
_TIE = 1e-12
_ROWS = DENOMINATOR.sum(1) == 4


def _tables(counts: Values | pd.DataFrame) -> Floats:
    found = as_floats(counts.to_numpy() if isinstance(counts, pd.DataFrame) else counts)
    if found.ndim not in (1, 2) or found.shape[-1] != 4 or not (found >= 0).all():
        raise DataError(
            f"verdicts need counts [groups, 4] of (tn, fp, fn, tp), none negative; found shape {found.shape}"
        )
    return np.atleast_2d(found)


def _components(metric: str) -> list[int]:
    """Return the places in :data:`RATES` of the rates whose largest gap a metric is."""
    if metric == "equalized_odds":
        return [TPR, FPR]
    rate = ALIASES.get(metric, metric)
    if rate not in RATES:
        raise RecipeError(unknown("metric of a verdict", metric, ["equalized_odds", *ALIASES, *RATES]))
    return [RATES.index(rate)]


def _short(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")


def degenerate(counts: Values | pd.DataFrame, *, half: bool = True, confidence: float = 0.95) -> str:
    """Return why decisions are none that equalised odds could be asked of, in words; empty where they are.

    ``counts`` [4] or [G, 4], taken together. Reasons: under 1 % or over 99 % of people are selected; of decisions at 0.5 (``half``),
    the accuracy is within noise of that of one answer for all, on the same people; the decision tells nothing of the label.
    Within noise: the paired difference is less than ``confidence`` asks of its standard error, in either direction. A model that is
    *worse* than one answer by more selects on purpose, which the last rule, TPR against FPR, examines at any threshold.

    >>> degenerate([990, 1, 9, 0])
    'selects nobody (0.1 %)'
    >>> degenerate([600, 100, 100, 200])
    ''
    """
    tn, fp, fn, tp = _tables(counts).sum(0).tolist()
    n, positives, negatives = tn + fp + fn + tp, fn + tp, tn + fp
    if not n:
        return ""
    selected = (fp + tp) / n
    if not FEWEST <= selected <= MOST:
        return f"selects {'nobody' if selected < FEWEST else 'everybody'} ({100 * selected:.1f} %)"
    # Against "no" for all only the selected differ, against "yes" for all only the others: right ones minus wrong ones.
    right, wrong = (tp, fp) if positives <= negatives else (tn, fn)
    gained, z = right - wrong, normal_width(confidence)
    noise = z * sqrt(max(right + wrong - gained**2 / n, 0.0))
    if half and abs(gained) <= noise:
        accuracy, majority = (tn + tp) / n, max(positives, negatives) / n
        return f"no better than one answer for all (accuracy {_short(accuracy)} against {_short(majority)})"
    if positives and negatives and gained <= noise:
        rates = tp / positives, fp / negatives
        error = sqrt(selected * (1 - selected) * (1 / positives + 1 / negatives))
        if rates[0] - rates[1] <= z * error:
            return f"tells nothing of the label (TPR {_short(rates[0])}, FPR {_short(rates[1])})"
    return ""


def enough(
    counts: Values | pd.DataFrame, metric: str = "equalized_odds", *, min_group_size: int = 30, min_class: int = 10
) -> Bools:
    """Return which groups, [G], have the people that a metric rests on: rows, and positives for TPR, negatives for FPR, or both.

    A rate rests on its denominator: ``min_class`` of it where that is not all rows, and ``min_group_size`` rows.
    """
    tables, used = _tables(counts), _components(metric)
    sizes = (tables @ DENOMINATOR[used].T) >= np.where(_ROWS[used], 0, min_class)
    return np.asarray(sizes.all(1) & (tables.sum(1) >= max(min_group_size, 1)))


@dataclass(frozen=True)
class GapVerdict:
    """The largest difference between groups with enough people, in [0, 1], its bootstrap interval, and the p-value of "no gap".

    ``used`` and ``left_out`` are places of groups; one without any person is in neither. NaN where fewer than two can be used,
    and ``p`` without permutations.
    """

    value: float
    low: float
    high: float
    p: float
    used: tuple[int, ...]
    left_out: tuple[int, ...]
    confidence: float = 0.95

    @property
    def distinguishable(self) -> bool:
        """Whether the gap can be told from none: p is at most 1 - confidence."""
        return self.p <= 1 - self.confidence + _TIE


def judge(
    counts: Values | pd.DataFrame,
    metric: str = "equalized_odds",
    *,
    min_group_size: int = 30,
    min_class: int = 10,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> GapVerdict:
    """Return the largest difference between groups with enough people (:func:`enough`), its interval, and whether there is a gap.

    ``metric``: ``equalized_odds`` (the larger of the TPR and the FPR difference), ``equal_opportunity``, ``demographic_parity``,
    ``accuracy`` or any of :data:`RATES`. The interval is that of :mod:`libmtl_fair.metrics.intervals`. ``p``: groups are permuted among
    the people that a rate is about, of one label for TPR and FPR, all for the selection rate and accuracy; the hits of each group are
    then multivariate hypergeometric. ``n_bootstrap`` or ``n_permutations`` 0: NaN in their place.

    >>> judge([[800, 200, 100, 400], [400, 100, 50, 200]]).p
    1.0
    """
    tables, components = _tables(counts), _components(metric)
    ready = enough(tables, metric, min_group_size=min_group_size, min_class=min_class)
    used = tuple(np.flatnonzero(ready).tolist())
    left_out = tuple(np.flatnonzero(~ready & (tables.sum(1) > 0)).tolist())
    kept = tables[ready]
    value, rng = _gap(table_rates(kept)[:, components]).item() if len(kept) else np.nan, np.random.default_rng(seed)
    low = high = p = np.nan
    if len(kept) < 2:
        return GapVerdict(np.nan, low, high, p, used, left_out, confidence)
    if n_bootstrap:
        shape = (1, len(components), len(kept), n_bootstrap)
        drawn: Floats = np.asarray(rng.standard_normal(shape, dtype=np.float32))
        every = np.broadcast_to(kept, (3, *kept.shape))
        data = rate_noise(every, table_rates(kept), table_rates(kept.sum(0)), drawn[:, :1])
        ends = gap_interval(data.joined(np.array(components), drawn), Gap(), confidence)
        low, high = float(ends[0][0]), float(ends[1][0])
    if n_permutations and not np.isnan(value):
        permuted = _permuted(kept, components, n_permutations, rng)
        p = (1 + int(np.count_nonzero(permuted >= value - _TIE))) / (1 + n_permutations)
    return GapVerdict(float(value), low, high, p, used, left_out, confidence)


def chance_gaps(
    counts: Sequence[Values | pd.DataFrame],
    metric: str = "equalized_odds",
    *,
    min_group_size: int = 30,
    min_class: int = 10,
    n_permutations: int = 1000,
    seed: int = 0,
) -> Floats:
    """Return what chance alone makes of the worst task's gap: [n_permutations], groups permuted as for :func:`judge`'s p **(ours)**.

    ``counts``: the tasks' [G, 4], permuted one apart from another. A task with fewer than two groups of enough people has no part;
    without any other all is NaN. Where differences are freed of chance, ``gap^2`` less the mean of these squares is what is left.

    >>> bool(chance_gaps([[[80, 20, 10, 40], [40, 10, 5, 20]]]).mean() > 0.05)
    True
    """
    components, rng, worst = _components(metric), np.random.default_rng(seed), np.full(n_permutations, np.nan)
    for tables in map(_tables, counts):
        kept = tables[enough(tables, metric, min_group_size=min_group_size, min_class=min_class)]
        if len(kept) > 1:
            worst = np.fmax(worst, _permuted(kept, components, n_permutations, rng))
    return worst


def _permuted(kept: Floats, components: Sequence[int], n: int, rng: np.random.Generator) -> Floats:
    """Return the gaps [n] of groups permuted among the people that each rate is about."""
    rates = []
    for k in components:
        sizes, hits = (np.rint(kept @ part[k]).astype(np.int64) for part in (DENOMINATOR, NUMERATOR))
        rates.append(divide(rng.multivariate_hypergeometric(sizes, hits.sum(), n, method="marginals"), sizes))
    return _gap(np.stack(rates, -1))


def _gap(rates: Floats) -> Floats:
    """Return the largest gap of rates [..., G, K]: over groups, then over rates."""
    top, bottom = (nan_reduce(end, rates, axis=-2) for end in (np.maximum, np.minimum))
    return nan_reduce(np.maximum, np.asarray(top - bottom))


@dataclass(frozen=True)
class Changes:
    """What changed for each group, [G]: method minus reference, with standard errors; NaN where a group has nobody to change for.

    The errors take the two models' decisions for independent: of the same people they agree, so the noise is rather less.
    """

    d_selection: Floats
    d_tpr: Floats
    d_fpr: Floats
    d_error: Floats
    se_selection: Floats
    se_tpr: Floats
    se_fpr: Floats
    se_error: Floats


def changes(reference: Values | pd.DataFrame, method: Values | pd.DataFrame) -> Changes:
    """Return the change of selection rate, TPR, FPR and error of each group, from both models' counts [G, 4] of the same people.

    Raises
    ------
    DataError
        The two have different groups.
    """
    before, after = _tables(reference), _tables(method)
    if before.shape != after.shape:
        raise DataError(f"changes need the same groups of both models, found {len(before)} and {len(after)}")
    rows = [RATES.index(name) for name in ("selection_rate", "true_positive_rate", "false_positive_rate", "accuracy")]
    sizes, hits = (np.stack([t @ part[rows].T for t in (before, after)]) for part in (DENOMINATOR, NUMERATOR))
    moved = np.diff(divide(hits, sizes), axis=0)[0].T * [[1], [1], [1], [-1]]
    # Smoothed, so that a rate of 0 or 1 is not taken for certain.
    rate = (hits + 0.5) / (sizes + 1)
    error = np.sqrt(divide(rate * (1 - rate), sizes).sum(0)).T
    return Changes(*moved, *error)


def levels_down(
    reference: Values | pd.DataFrame,
    method: Values | pd.DataFrame,
    metric: str = "equalized_odds",
    *,
    min_group_size: int = 30,
    min_class: int = 10,
    confidence: float = 0.95,
) -> bool:
    """Return whether a method levels down: the gap shrinks, some group's TPR falls more than any rises, and none rises by more than noise.

    Only groups with enough people count, for the gap and for their TPR. Noise: what ``confidence`` asks of the standard error.
    """
    each = [_tables(reference), _tables(method)]
    moved, z = changes(*each), normal_width(confidence)
    sized = [enough(t, metric, min_group_size=min_group_size, min_class=min_class) for t in each]
    both, components = sized[0] & sized[1], _components(metric)
    seen = both & enough(each[0], "equal_opportunity", min_group_size=min_group_size, min_class=min_class)
    if both.sum() < 2 or not seen.any():
        return False
    before, after = (_gap(table_rates(t[both])[:, components]).item() for t in each)
    d, error = moved.d_tpr[seen], moved.se_tpr[seen]
    return bool(after < before - _TIE and -d.min() > d.max() and not (d > z * error).any())


def counts_from_rows(frame: pd.DataFrame, label: str = "") -> pd.DataFrame:
    """Return the counts of each group, [G, 4] as tn, fp, fn, tp under the groups' names, from :class:`GroupMetrics`' rows.

    ``frame`` holds the rows (metric, group, value, n) of one task and attribute of one model; of several labels or classes those of
    ``label``. Rates times people, rounded: exact for unweighted metrics. A group without a base rate (nobody) has zeros.

    Raises
    ------
    DataError
        Rows of several tasks, attributes or models.
    """
    names = ["base_rate", "true_positive_rate", "false_positive_rate"]
    suffix = f"[{label}]" if label else ""
    rows = frame[frame["metric"].isin([f"{name}{suffix}" for name in names])]
    rows = rows[~rows["group"].isin(["overall", "difference", "ratio"])]
    if rows.duplicated(["metric", "group"]).any():
        raise DataError("counts_from_rows needs the rows of one task, attribute and model; found several for one rate")
    groups = list(dict.fromkeys(rows["group"]))
    values = rows.pivot(index="group", columns="metric", values="value").reindex(groups)
    base, tpr, fpr = (
        values.get(f"{name}{suffix}", pd.Series(np.nan, index=groups)).fillna(0).to_numpy(float) for name in names
    )
    n = rows.groupby("group", sort=False)["n"].first().to_numpy(float)
    positives = np.rint(base * n)
    tp, fp = np.rint(tpr * positives), np.rint(fpr * (n - positives))
    cells = np.stack([n - positives - fp, fp, positives - tp, tp], axis=-1).astype(np.int64).reshape(-1, 4)
    return pd.DataFrame(cells, index=pd.Index(groups, name="group"), columns=list(CELLS))


def power(
    gap: float, sizes: tuple[float, float], rate: float = 0.5, *, confidence: float = 0.95, comparisons: int = 1
) -> float:
    """Return the probability that a test sees a gap between two groups with ``sizes`` people, ``rate`` the mean of their rates.

    Normal approximation of the test of two rates (Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 2003, ch. 4);
    two-sided; ``comparisons`` made at once share the error probability (Bonferroni).

    >>> round(power(0.1, (388, 388), 0.45), 3)
    0.801
    """
    if not 0 < gap <= 1 or min(sizes) <= 0 or not 0 < rate < 1 or not 0 < confidence < 1:
        raise RecipeError(
            f"power needs a gap in (0, 1], people, and a rate and confidence in (0, 1); found {gap}, {sizes}, {rate}, {confidence}"
        )
    (a, b), normal = sizes, NormalDist()
    low, high = _pair(rate, gap)
    middle = (a * low + b * high) / (a + b)
    z = normal.inv_cdf(1 - (1 - confidence) / (2 * comparisons))
    null, other = sqrt(middle * (1 - middle) * (1 / a + 1 / b)), sqrt(low * (1 - low) / a + high * (1 - high) / b)
    apart = high - low
    return normal.cdf((apart - z * null) / other) if other > 0 else float(apart > z * null)


def _pair(rate: float, gap: float) -> tuple[float, float]:
    """Return two rates ``gap`` apart around ``rate``, moved inwards where they would leave [0, 1]."""
    low = min(max(rate - gap / 2, 0.0), 1.0 - gap)
    return low, low + gap


def people_needed(
    gap: float,
    rate: float = 0.5,
    *,
    wanted: float = 0.8,
    confidence: float = 0.95,
    comparisons: int = 1,
    ratio: float = 1.0,
) -> int:
    """Return the people that a group needs so that :func:`power` is ``wanted``; the other group has ``ratio`` times as many.

    People that the rate is about: positives for TPR, negatives for FPR.

    >>> people_needed(0.1, 0.45)
    388
    """
    power(gap, (1, ratio), rate, confidence=confidence)  # refuses what makes no sense
    if not 0 < wanted < 1:
        raise RecipeError(f"the power wanted must lie in (0, 1), found {wanted}")
    low, high = _pair(rate, gap)
    middle, normal = (low + ratio * high) / (1 + ratio), NormalDist()
    null = normal.inv_cdf(1 - (1 - confidence) / (2 * comparisons)) * sqrt(middle * (1 - middle) * (1 + 1 / ratio))
    other = normal.inv_cdf(wanted) * sqrt(low * (1 - low) + high * (1 - high) / ratio)
    return ceil(max(null + other, 0.0) ** 2 / gap**2)


def smallest_gap(
    sizes: tuple[float, float],
    rate: float = 0.5,
    *,
    wanted: float = 0.8,
    confidence: float = 0.95,
    comparisons: int = 1,
) -> float:
    """Return the smallest gap between two groups that a test sees with :func:`power` ``wanted``; NaN if none can be seen.

    >>> round(smallest_gap((388, 388), 0.45), 3)
    0.1
    """
    from scipy.optimize import brentq

    def lacking(gap: float) -> float:
        return wanted - power(gap, sizes, rate, confidence=confidence, comparisons=comparisons)

    if min(sizes) <= 0 or lacking(1.0) > 0:
        return float("nan")
    return float(brentq(lacking, 1e-6, 1.0)) if lacking(1e-6) > 0 else 1e-6
