"""The long table of group metrics: one row per task, attribute, metric and group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.metrics.arrays import Floats

COLUMNS = ["task", "attribute", "metric", "group", "value", "n", "low", "high", "flag"]
RESERVED = ("difference", "ratio", "overall")
"""What the column ``group`` holds besides groups; no group may be named so."""


@dataclass
class GroupRows:
    """Rows of one task and attribute.

    ``counts`` [G] are the groups' rows with a label, which ``n`` shows and by which groups are flagged as small.
    """

    task: str
    attribute: str
    names: Sequence[str]
    counts: Floats
    min_group_size: int
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def add_groups(self, metric: str, values: Floats, low: Floats | None = None, high: Floats | None = None) -> None:
        """Add a row per group: ``values`` [G] with their intervals."""
        lows = np.full(len(values), np.nan) if low is None else low
        highs = np.full(len(values), np.nan) if high is None else high
        for g, name in enumerate(self.names):
            self._add(metric, name, values[g], self.counts[g], lows[g], highs[g], self._group_flag(values[g], g))

    def add_overall(self, metric: str, value: float, low: float = np.nan, high: float = np.nan) -> None:
        """Add the value of all known groups together."""
        flag = "undefined" if np.isnan(value) else ""
        self._add(metric, "overall", value, self.counts.sum(), low, high, flag)

    def add_gap(
        self, metric: str, kind: str, value: float, low: float = np.nan, high: float = np.nan, *, among: Floats
    ) -> None:
        """Add a ``difference`` or ``ratio``; ``among`` [..., G] are the values it was taken from."""
        used = np.asarray(~np.isnan(among.reshape(-1, among.shape[-1])).all(0))
        flag = ""
        if np.isnan(value):
            flag, low, high = "undefined", np.nan, np.nan
        elif used.sum() < 2:
            flag = "single"
        elif (self.counts[used] < self.min_group_size).any():
            flag = "small"
        self._add(metric, kind, value, self.counts.sum(), low, high, flag)

    def add_unknown(self, count: float, flag: str) -> None:
        """Add how many rows with a label have no known group."""
        self._add("count", "unknown", count, count, np.nan, np.nan, flag)

    def _group_flag(self, value: float, g: int) -> str:
        if np.isnan(value):
            return "undefined"
        return "small" if self.counts[g] < self.min_group_size else ""

    def _add(self, metric: str, group: str, value: Any, n: Any, low: Any, high: Any, flag: str) -> None:
        row = (metric, group, float(value), int(n), float(low), float(high), flag)
        self.rows.append((self.task, self.attribute, *row))


def to_frame(parts: Sequence[GroupRows]) -> pd.DataFrame:
    """Return all rows as one DataFrame with :data:`COLUMNS`, flags empty strings where there is nothing to say."""
    frame = pd.DataFrame([row for part in parts for row in part.rows], columns=COLUMNS)
    return frame.astype({"value": float, "n": "int64", "low": float, "high": float})
