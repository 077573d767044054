"""The long table of group metrics, made in columns: values of the groups, their differences and ratios, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from scipy.stats import t as student

from libmtl_fair.arrays import Array, Bools, Floats, Ints
from libmtl_fair.metrics.group_state import Rows, SummedState, TaskState
from libmtl_fair.metrics.intervals import (
    Gap,
    GroupNoise,
    effective_sizes,
    gap_interval,
    normal_width,
    rate_noise,
    wilson,
)
from libmtl_fair.metrics.rates import ALIASES, DENOMINATOR, FPR, RATES, TPR, combine, gaps, table_rates
from libmtl_fair.metrics.scores import REGRESSION, binned_shares, group_auc, group_regression, ks_distance
from libmtl_fair.tasks import Regression

RESERVED = ("difference", "ratio", "overall")
"""What the column ``group`` holds besides groups; no group may be named so."""

_FLAGS = np.array(["", "small", "single", "dropped", "undefined", "few"], dtype=object)
_FEW = 5
_N = len(RATES)
_SELECTION, _ACCURACY = RATES.index("selection_rate"), RATES.index("accuracy")
_UNIT = (0.0, 1.0)
_BOUNDS = {"mae": (0.0, np.inf), "rmse": (0.0, np.inf), "r2": (-np.inf, 1.0), "ccc": (-1.0, 1.0)}
_BINS = 32

Bounds: TypeAlias = tuple[float, float]
Ends: TypeAlias = Sequence[Array | float]


@dataclass(frozen=True)
class Options:
    """How gaps are taken and their intervals drawn: arguments of :class:`GroupMetrics`."""

    empty: str = "missing"
    method: str = "between_groups"
    agg: str = "worst_case"
    confidence: float | None = 0.95
    n_bootstrap: int = 1000
    min_group_size: int = 30
    min_class: int = 10

    @property
    def level(self) -> float | None:
        """Level of the gaps' intervals; None where none are wanted."""
        return self.confidence if self.n_bootstrap > 0 else None


class Rates(NamedTuple):
    """All rates of L labels as L * 8 problems: their noise, their differences and ratios, and which rest on few people, [L * 8, G]."""

    noise: GroupNoise
    gaps: tuple[Floats, Floats]
    few: Bools


class GroupTable:
    """Rows of one task and attribute: ``blocks`` of (metrics, groups, values, n, low, high, flags).

    ``counts`` [G] are the groups' rows with a label, which ``n`` shows and by which groups are flagged as small.
    """

    def __init__(self, names: Sequence[str], counts: Floats, options: Options, rng: np.random.Generator) -> None:
        self.names, self.counts, self.options, self.rng = names, counts, options, rng
        self.small = counts < options.min_group_size
        self.blocks: list[tuple[list[str] | Array, ...]] = []

    def add(
        self,
        metrics: list[str],
        groups: list[str],
        values: Array,
        n: Array | float,
        flags: Array | int,
        ends: Ends = (np.nan, np.nan),
    ) -> None:
        """Add rows with the ``ends`` of their intervals; ``flags`` are places in the list of flags, before undefined values."""
        many = len(metrics)
        numbers = (v if isinstance(v, np.ndarray) and v.ndim else np.full(many, v) for v in (values, n, *ends, flags))
        self.blocks.append((metrics, groups, *numbers))

    def values(
        self,
        metrics: Sequence[str],
        values: Floats,
        ends: Ends = (np.nan, np.nan),
        few: Bools | bool = False,
    ) -> None:
        """Add a row per metric and group, ``values`` [M, G + 1] with their intervals: the last is that of all known groups.

        ``few`` [M, G + 1] are those that rest on few people.
        """
        groups, many = [*self.names, "overall"], len(metrics)
        n, small = np.append(self.counts, self.counts.sum()), np.append(self.small, False)
        flags = np.broadcast_to(np.where(small, 1, np.where(few, _FEW, 0)), (many, len(groups)))
        shown = [metric for metric in metrics for _ in groups]
        flat = [end.ravel() if isinstance(end, np.ndarray) else end for end in ends]
        self.add(shown, groups * many, values.ravel(), np.tile(n, many), flags.ravel(), flat)

    def normal(
        self, metric: str, values: Floats, errors: Floats, counts: Array, bounds: Bounds, few: Bools | bool = False
    ) -> None:
        """Add values [G + 1] whose standard errors are normal, and their gaps; ``counts`` [G] weigh the groups."""
        confidence, rests = self.options.confidence, np.broadcast_to(few, values.shape)
        z = np.nan if confidence is None else normal_width(confidence)
        self.values([metric], values, [np.clip(values + side * errors, *bounds) for side in (-z, z)], rests)
        shares = np.where(np.isnan(values[:-1]), 0.0, counts)
        shares = shares / max(shares.sum(), 1)
        known = np.where(np.isnan(errors[:-1]), 0.0, errors[:-1])
        value, share, error = (part[None, None] for part in (values[:-1], shares, known))
        data = GroupNoise(value, self.noise(1), values[None, -1:], share, error=error, bounds=bounds)
        self.gaps([metric], data, rests[None, :-1])

    def replicated(self, metric: str, values: Floats, drawn: Floats | None, bounds: Bounds) -> None:
        """Add values [G + 1] with intervals by their replicates ``drawn`` [R, G + 1], and their gaps.

        The expanded percentile interval (Hesterberg 2015): as much wider as the t of so few examples is than the normal. A group
        without replicates has no interval, and no gap has one that it is in.
        """
        level, n = self.options.level, np.append(self.counts, self.counts.sum())
        if drawn is None or level is None:
            drawn, level = np.full((1, len(values)), np.nan), 0.5
        degrees = np.maximum(n - 1, 1)
        wide = np.sqrt((degrees + 1) / degrees) * student.ppf((1 + level) / 2, degrees)
        tails = normal.sf(wide)
        ends = [np.array([np.quantile(*each) for each in zip(drawn.T, tail)]) for tail in (tails, 1 - tails)]
        self.values([metric], values, ends)
        errors = drawn[:, :-1].std(0)
        noise = np.divide(drawn[:, :-1] - values[:-1], errors, out=np.zeros_like(drawn[:, :-1]), where=errors > 0)
        errors *= (wide / normal.ppf((1 + level) / 2))[:-1]
        shares = np.where(np.isnan(values[:-1]), 0, self.counts / max(n[-1], 1))
        value, share, error = (part[None, None] for part in (values[:-1], shares, errors))
        data = GroupNoise(value, noise.T[None, None], values[None, -1:], share, error=error, bounds=bounds)
        self.gaps([metric], data, np.zeros((1, len(shares)), dtype=bool))

    def noise(self, components: int) -> Floats:
        """Return standard normal noise [1, K, G, R], common to all problems."""
        replicates = 0 if self.options.level is None else self.options.n_bootstrap
        drawn = self.rng.standard_normal((1, components, len(self.names), replicates), dtype=np.float32)
        return np.asarray(drawn)

    def gaps(self, names: Sequence[str], data: GroupNoise, few: Bools) -> tuple[Floats, Floats]:
        """Add difference and ratio of each problem of ``data`` (one component each), also under its names of fairness; return them."""
        shown = []
        for p, name in enumerate(names):
            rate, bracket, rest = name.partition("[")
            aliases = [f"{alias}{bracket}{rest}" for alias, of in ALIASES.items() if of == rate]
            shown += [(p, each) for each in (name, *aliases)]
        at = np.array([p for p, _ in shown])
        used, to_overall = ~np.isnan(data.values[at, 0]), self.options.method == "to_overall"
        found = gaps(data.values[:, 0], data.centre[:, 0] if to_overall else None)
        for k, kind in enumerate(RESERVED[:2]):
            ends = [end[at] for end in self._interval(data, Gap(k == 1, to_overall))]
            self.gap_rows([name for _, name in shown], kind, found[k][at], used, ends, few[at])
        return found

    def joined(self, name: str, rates: Rates, components: Array, agg: str, inner: int = 1) -> None:
        """Add difference and ratio of several components of ``rates`` as one: the worst or the mean of those that a group has.

        With ``inner`` > 1 and ``agg="mean"``: the mean of the worst of each ``inner`` neighbours.
        """
        data, found = rates.noise, rates.gaps
        seen = ~np.isnan(data.values[components, 0])
        few = (rates.few[components] & seen).any(0)[None]
        # An absent component is replaced by a neighbour of its ``inner`` block, or the block drops.
        blocks, present = components.reshape(-1, inner), seen.any(-1).reshape(-1, inner)
        first = np.take_along_axis(blocks, present.argmax(1)[:, None], 1)
        kept = np.where(present, blocks, first)[present.any(1)].ravel()
        many = data.joined(kept, self.noise(len(kept))) if len(kept) and self.options.level is not None else None
        for k, (kind, worst) in enumerate(zip(RESERVED[:2], (np.maximum, np.minimum))):
            parts = found[k][components]
            if agg == "mean" and inner > 1:
                parts = combine(parts.reshape(-1, inner), "worst_case", worst)
            gap = Gap(k == 1, self.options.method == "to_overall", agg == "mean", inner)
            ends = (np.nan, np.nan) if many is None else self._interval(many, gap)
            self.gap_rows([name], kind, combine(parts, agg, worst), seen.any(0)[None], ends, few)

    def _interval(self, data: GroupNoise, gap: Gap) -> tuple[Floats, Floats]:
        unknown = data.error is not None and np.isnan(data.error[~np.isnan(data.values)]).any()
        if self.options.level is None or unknown:
            missing = np.full(len(data.values), np.nan)
            return missing, missing
        return gap_interval(data, gap, self.options.level)

    def gap_rows(
        self, names: list[str], kind: str, values: Floats, used: Array, ends: Ends, few: Bools | bool = False
    ) -> None:
        """Add differences or ratios; ``used`` [M, G] are the groups that they were taken from, ``few`` those of few people."""
        rests = (used & few).any(-1)
        flags = np.where(used.sum(-1) < 2, 2, np.where((used & self.small).any(-1), 1, np.where(rests, _FEW, 0)))
        self.add(names, [kind] * len(names), values, self.counts.sum(), flags, ends)


def to_frame(tables: Iterable[tuple[str, str, GroupTable]]) -> pd.DataFrame:
    """Return the rows of all (task, attribute, table) as one DataFrame, flags empty strings where there is nothing to say."""
    blocks = [(task, attribute, block) for task, attribute, table in tables for block in table.blocks]
    value, n, low, high, flag = (np.concatenate([block[k] for *_, block in blocks]) for k in range(2, 7))
    columns = {
        "task": [task for task, _, block in blocks for _ in block[0]],
        "attribute": [attribute for _, attribute, block in blocks for _ in block[0]],
        "metric": [metric for *_, block in blocks for metric in block[0]],
        "group": [group for *_, block in blocks for group in block[1]],
        "value": value,
        "n": n.astype(np.int64),
        "low": np.where(np.isnan(value), np.nan, low),
        "high": np.where(np.isnan(value), np.nan, high),
        "flag": _FLAGS[np.where(np.isnan(value), 4, flag)],
    }
    return pd.DataFrame(columns)


def add_task(
    table: GroupTable, state: TaskState | SummedState, attribute: str, counted: Floats, kept: Rows | None
) -> None:
    """Add every metric of the task for one attribute, from its confusion table [3, G, cells] and the rows kept."""
    task = state.task
    if isinstance(state, SummedState):
        _add_summed(table, state, attribute, counted[0, :, 1:], kept)
        return
    if isinstance(task, Regression) and kept is not None:
        _add_regression(table, task, kept, attribute)
        return
    names = getattr(task, "classes", None) or getattr(task, "labels", None) or range(task.out_features)
    suffixes = [""] if task.kind == "binary" else [f"[{name}]" for name in names]
    if task.kind == "multiclass":
        square = counted.reshape(*counted.shape[:2], task.out_features, task.out_features)
        _add_labels(table, one_vs_rest(square), suffixes)
        right, every = np.trace(square, axis1=2, axis2=3), square.sum((2, 3))
        cells = np.stack([np.zeros_like(right), np.zeros_like(right), every - right, right], axis=-1)
        _add_rates(table, cells[:, None], [""], [_ACCURACY])
    else:
        _add_labels(table, counted.reshape(3, counted.shape[1], -1, 4).swapaxes(1, 2), suffixes)
    if state.auc and kept is not None:
        _add_auc(table, kept, kept.ids[attribute].numpy(), suffixes)


def one_vs_rest(square: Floats) -> Floats:
    """Return [3, C, G, 4] binary tables of each class against the rest from confusion tables [3, G, C, C]."""
    both = np.diagonal(square, axis1=2, axis2=3)
    true, chosen = square.sum(3), square.sum(2)
    every = square.sum((2, 3))[..., None]
    cells = np.stack([every - true - chosen + both, chosen - both, true - both, both], axis=-1)
    return cells.swapaxes(1, 2)


def _add_rates(table: GroupTable, cells: Floats, suffixes: Sequence[str], keep: Sequence[int] = range(_N)) -> Rates:
    """Add rates and their gaps of each label, ``cells`` [3, L, G, 4]; return what joins them."""
    every = np.concatenate([cells, cells.sum(2, keepdims=True)], axis=2)
    rates = table_rates(every[1], every[0].sum(-1), table.options.empty)
    names = [f"{RATES[i]}{suffix}" for suffix in suffixes for i in keep]
    level = table.options.confidence
    found = () if level is None else wilson(rates, effective_sizes(every), level)
    shown, *ends = (part[..., list(keep)].swapaxes(1, 2) for part in (rates, *found))
    sparse = (every[0] @ DENOMINATOR.T < table.options.min_class) & (DENOMINATOR.sum(1) < 4)
    few = sparse[..., list(keep)].swapaxes(1, 2).reshape(len(names), -1)
    table.values(names, shown, ends or (np.nan, np.nan), few)
    data = rate_noise(cells, rates[:, :-1], rates[:, -1], table.noise(1))
    if len(keep) < _N:
        data = data.joined(np.array(keep), data.noise)
    return Rates(data, table.gaps(names, data, few[:, :-1]), few[:, :-1])


def _add_labels(table: GroupTable, cells: Floats, suffixes: Sequence[str]) -> None:
    """Add each label, or class one-vs-rest, and equalised odds; of several, parity, opportunity and odds over all of them.

    ``equalized_odds`` is that of the worst class (``agg="mean"``: the mean); ``_mean_over_classes`` the mean (ours).
    """
    rates = _add_rates(table, cells, suffixes)
    agg = table.options.agg
    first = np.arange(len(suffixes)) * _N
    odds = (first[:, None] + [TPR, FPR]).ravel()
    for suffix, pair in zip(suffixes, odds.reshape(-1, 2)):
        table.joined(f"equalized_odds{suffix}", rates, pair, agg)
    if list(suffixes) == [""]:
        table.joined("equalized_odds_mean", rates, odds, "mean")
        return
    for name, index in (("demographic_parity", _SELECTION), ("equal_opportunity", TPR)):
        table.joined(name, rates, first + index, "worst_case")
        table.joined(f"{name}_mean_over_classes", rates, first + index, "mean")
    table.joined("equalized_odds", rates, odds, agg)
    inner = 2 if agg == "worst_case" else 1
    table.joined("equalized_odds_mean_over_classes", rates, odds, "mean", inner)


def _add_auc(table: GroupTable, kept: Rows, ids: Ints, suffixes: Sequence[str]) -> None:
    """Add the AUC of each label or class, and their mean, with DeLong intervals."""
    values, labels, observed = (part.numpy() for part in kept[:3])
    weight = None if kept.weight is None else kept.weight.numpy()
    parts = []
    for k, suffix in enumerate(suffixes):
        score, label, seen = (part if part.ndim == 1 else part[:, k] for part in (values, labels, observed))
        positive = label == k if labels.ndim < values.ndim else label > 0.5
        rows = np.flatnonzero(seen & (ids >= 0))
        columns, weights = (score[rows], positive[rows]), None if weight is None else weight[rows]
        errors = table.options.level is not None
        groups = ((ids[rows], len(table.names)), (np.zeros(len(rows), dtype=np.int64), 1))
        every = [group_auc(*columns, *each, errors=errors, sample_weight=weights) for each in groups]
        fields = ("value", "error", "positives", "negatives")
        value, error, *sizes = (np.concatenate([getattr(part, name) for part in every]) for name in fields)
        few: Bools = np.asarray(np.minimum(*sizes) < table.options.min_class)
        parts.append((value, error, few))
        table.normal(f"auc{suffix}", value, error, table.counts, _UNIT, few)
    if list(suffixes) != [""]:
        values, all_errors, sparse = (np.stack(part) for part in zip(*parts))
        table.normal("auc", *_mean(values, all_errors), table.counts, _UNIT, np.asarray(sparse.any(0)))


def _mean(values: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Return the mean over classes [C, G + 1]; its error as if the classes' were fully correlated (too wide, never too narrow)."""
    known = ~np.isnan(values)
    count = np.maximum(known.sum(0), 1)
    value = np.where(known.any(0), np.where(known, values, 0).sum(0) / count, np.nan)
    return value, np.where(known, np.nan_to_num(errors), 0).sum(0) / count


def _add_summed(table: GroupTable, state: SummedState, attribute: str, sums: Floats, kept: Rows | None) -> None:
    """Add every metric that is made of sums over examples, with intervals by drawing the examples of each group anew."""
    values, drawn = state.metrics(np.concatenate([sums, sums.sum(0, keepdims=True)])), None
    if kept is not None and len(kept.values):
        drawn = state.replicates(attribute, kept, table.options.n_bootstrap, table.rng)
    for m, (name, higher) in enumerate(state.task.shown.values()):
        table.replicated(name, values[m], None if drawn is None else drawn[m], _UNIT if higher else (0.0, np.inf))


def _add_regression(table: GroupTable, task: Regression, kept: Rows, attribute: str) -> None:
    """Add every metric of :data:`REGRESSION` and the KS distance, in native units."""
    ids = kept.ids[attribute].numpy()
    rows = np.flatnonzero(kept.observed.numpy() & (ids >= 0))
    group, groups = ids[rows], len(table.names)
    prediction, target = (part.double().numpy()[rows] * task.std + task.mean for part in (kept.values, kept.labels))
    weight = None if kept.weight is None else kept.weight.numpy()[rows]
    found = group_regression(prediction, target, group, groups, weight)
    every = group_regression(prediction, target, np.zeros_like(group), 1, weight)
    values, errors = np.append(found.values, every.values, 1), np.append(found.errors, every.errors, 1)
    counts = found.counts
    for m, name in enumerate(REGRESSION):
        table.normal(name, values[m], errors[m], counts, _BOUNDS.get(name, (-np.inf, np.inf)))
    value, low, high = ks_distance(prediction, group, groups), np.nan, np.nan
    if table.options.level is not None and np.isfinite(value):
        shares = binned_shares(prediction, group, groups, _BINS)
        data = _ks_noise(shares, counts, table.options.n_bootstrap, table.rng)
        ends = gap_interval(data, Gap(), table.options.level)
        # The bins see a little less than the whole distance: the interval moves with the estimate.
        moved = value - float(np.nanmax(np.nanmax(shares, 1) - np.nanmin(shares, 1)))
        low, high = max(float(ends[0][0]), 0.0), min(float(ends[1][0]) + moved, 1.0)
    table.gap_rows(["ks"], "difference", np.array([value]), (counts > 0)[None], (low, high))


def _ks_noise(shares: Floats, counts: Ints, n_bootstrap: int, rng: np.random.Generator) -> GroupNoise:
    bins, groups = shares.shape
    known = np.nan_to_num(shares)
    chances = np.diff(known, axis=0, prepend=0.0, append=1.0).T
    drawn = rng.multinomial(counts, np.clip(chances, 0, 1), size=(n_bootstrap, groups))
    errors = drawn.cumsum(-1)[..., :-1] / np.maximum(counts, 1)[:, None] - known.T
    centre = (known * counts).sum(1) / max(counts.sum(), 1)
    weight = np.broadcast_to(counts / max(counts.sum(), 1), (1, bins, groups))
    noise = np.ascontiguousarray(errors.transpose(2, 1, 0))[None]
    return GroupNoise(shares[None], noise, centre[None], weight, error=np.ones((1, bins, groups)))
