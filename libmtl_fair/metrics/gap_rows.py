"""Differences and ratios of values per group, alone and combined, with intervals, as rows of the long table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from libmtl_fair.metrics.arrays import Floats
from libmtl_fair.metrics.bootstrap import join
from libmtl_fair.metrics.gaps import Gap
from libmtl_fair.metrics.group_rows import GroupRows
from libmtl_fair.metrics.intervals import GroupNoise, gap_interval
from libmtl_fair.metrics.rates import combine, difference, ratio

KINDS = ("difference", "ratio")


@dataclass(frozen=True)
class ReportOptions:
    """How gaps are taken and their intervals drawn: arguments of :class:`GroupMetrics`."""

    empty: str = "missing"
    method: str = "between_groups"
    agg: str = "worst_case"
    confidence: float | None = 0.95
    n_bootstrap: int = 1000

    @property
    def intervals(self) -> bool:
        """Whether intervals are wanted."""
        return self.confidence is not None and self.n_bootstrap > 0


class GapWriter:
    """Writes gaps of one task and attribute."""

    def __init__(self, rows: GroupRows, options: ReportOptions, rng: np.random.Generator) -> None:
        """Keep where the rows go, and the random numbers of this task and attribute."""
        self.rows, self.options, self.rng = rows, options, rng

    def draws(self, components: int, groups: int) -> Floats:
        """Return standard normal noise [1, K, G, R], common to all problems."""
        replicates = self.options.n_bootstrap if self.options.intervals else 0
        drawn: Any = self.rng.standard_normal((1, components, groups, replicates), dtype=np.float32)
        return np.asarray(drawn)

    def single(
        self, names: Sequence[str], data: GroupNoise, aliases: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Write difference and ratio of each problem of ``data`` (one component each) under its name and aliases."""
        for kind in KINDS:
            values = self._values(kind, data.values[:, 0], data.centre[:, 0])
            low, high = self._interval(kind, data)
            for p, name in enumerate(names):
                for shown in (name, *(aliases or {}).get(name, ())):
                    self.rows.add_gap(shown, kind, values[p], low[p], high[p], among=data.values[p])

    def joined(self, name: str, data: GroupNoise, components: Sequence[int], agg: str, inner: int = 1) -> None:
        """Write difference and ratio of several components as one: the worst (``worst_case``) or the mean of them.

        With ``inner`` > 1 and ``agg="mean"``: the mean of the worst of each ``inner`` neighbours. A component that no group
        has drops out.
        """
        index = np.asarray(components)
        values = data.values[index, 0]
        kept = _replace_absent(index, ~np.isnan(values).all(-1), inner)
        noise = None
        if len(kept) and self.options.intervals:
            noise = join([kept.tolist()], data, self.draws(len(kept), values.shape[-1]))
        for kind in KINDS:
            parts = self._values(kind, values, data.centre[index, 0])
            worst = np.maximum if kind == "difference" else np.minimum
            if agg == "mean" and inner > 1:
                parts = combine(parts.reshape(-1, inner), "worst_case", worst)
            low, high = (np.nan, np.nan)
            if noise is not None:
                ends = self._interval(kind, noise, mean=agg == "mean", inner=inner)
                low, high = float(ends[0][0]), float(ends[1][0])
            self.rows.add_gap(name, kind, float(combine(parts, agg, worst)), low, high, among=values)

    def _values(self, kind: str, values: Floats, overall: Floats) -> Floats:
        of = difference if kind == "difference" else ratio
        return of(values, overall, self.options.method)

    def _interval(self, kind: str, data: GroupNoise, **how: Any) -> tuple[Floats, Floats]:
        if not self.options.intervals or self.options.confidence is None:
            missing = np.full(len(data.values), np.nan)
            return missing, missing
        gap = Gap(ratio=kind == "ratio", to_overall=self.options.method == "to_overall", **how)
        return gap_interval(data, gap, self.options.confidence)


def _replace_absent(index: Any, present: Any, inner: int) -> Any:
    """Return the components to draw: an absent one is replaced by a neighbour of its ``inner`` block, or the block drops."""
    kept = []
    for start in range(0, len(index), inner):
        block, seen = index[start : start + inner], present[start : start + inner]
        if seen.any():
            kept.extend(np.where(seen, block, block[seen.argmax()]))
    return np.asarray(kept, dtype=np.int64)
