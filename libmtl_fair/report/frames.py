"""The numbers of a run as tidy tables: utility, audit, groups, shrinkage; one row a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from libmtl_fair.report.run_folder import RunFolder, SeedRun

_GROUP_COLUMNS = ["method", "seed", "task", "attribute", "metric", "group", "value", "n", "low", "high", "flag"]
_AUDIT_COLUMNS = ["method", "seed", "delta_name", "delta", "bias", "violation_rate", "exact"]
_PAIR_COLUMNS = ["method", "seed", "delta_name", "task_a", "task_b", "bias", "violation_rate", "delta"]


def number(value: Any) -> float:
    """A float; what is missing or no number is NaN.

    >>> number(None), number("x"), number(2)
    (nan, nan, 2.0)
    """
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """Rows of a frame as named tuples, whose fields are of any type."""
    yield from frame.itertuples(index=False)


def utility_frame(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, seed, task (``macro`` too), metric, value."""
    found = [
        (item.method, item.seed, task, metric, number(value))
        for item in run.runs
        for task, metrics in (item.part("utility", split or run.split) or {}).items()
        for metric, value in metrics.items()
    ]
    return pd.DataFrame(found, columns=["method", "seed", "task", "metric", "value"])


def audit_frame(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return method, seed, delta_name, delta, bias, violation_rate, exact."""
    found = [
        (item.method, item.seed, _name(entry), *_numbers(entry, "delta", "bias", "violation_rate"), entry.get("exact"))
        for item, entry in _entries(run, "audit", split)
    ]
    return pd.DataFrame(found, columns=_AUDIT_COLUMNS)


def pair_frame(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return the audit by task pair: method, seed, delta_name, task_a, task_b, bias, violation_rate, delta."""
    found = [
        [
            item.method,
            item.seed,
            _name(entry),
            *_texts(pair, "task_a", "task_b"),
            *_numbers(pair, "bias", "violation_rate", "delta"),
        ]
        for item, entry in _entries(run, "audit", split)
        for pair in entry.get("per_pair") or []
        if isinstance(pair, Mapping)
    ]
    return pd.DataFrame(found, columns=_PAIR_COLUMNS)


def shrinkage_frame(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return the curve of the shrunk reference: method, seed, delta_name, a, bias, brier."""
    found = [
        (item.method, item.seed, str(entry.get("delta_name") or ""), *_numbers(entry, "a", "bias", "brier"))
        for item, entry in _entries(run, "shrinkage", split)
    ]
    return pd.DataFrame(found, columns=["method", "seed", "delta_name", "a", "bias", "brier"])


def groups_frame(run: RunFolder, split: str | None = None) -> pd.DataFrame:
    """Return group metrics in long format with method and seed; values, n and intervals are floats."""
    texts, numbers = ("task", "attribute", "metric", "group"), ("value", "n", "low", "high")
    found = [
        [item.method, item.seed, *_texts(entry, *texts), *_numbers(entry, *numbers), _flag(entry.get("flag"))]
        for item, entry in _entries(run, "groups", split)
    ]
    return pd.DataFrame(found, columns=_GROUP_COLUMNS)


def mean_sd(frame: pd.DataFrame, by: list[str], value: str = "value") -> pd.DataFrame:
    """Return mean, sd (between seeds, n - 1; NaN for one seed) and n of the numbers there, in order of appearance."""
    grouped = frame.groupby(by, sort=False)[value]
    return grouped.agg(mean="mean", sd="std", n="count").reset_index()


def _entries(run: RunFolder, part: str, split: str | None) -> Iterable[tuple[SeedRun, Mapping[str, Any]]]:
    return ((item, entry) for item in run.runs for entry in item.part(part, split or run.split) or [])


def _name(entry: Mapping[str, Any]) -> str:
    name = entry.get("delta_name")
    return f"{number(entry.get('delta')):g}" if name is None else str(name)


def _numbers(entry: Mapping[str, Any], *keys: str) -> tuple[float, ...]:
    return tuple(number(entry.get(key)) for key in keys)


def _texts(entry: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(str(entry.get(key)) for key in keys)


def _flag(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or value is False or (isinstance(value, float) and math.isnan(value)):
        return ""
    return "flagged" if value is True else str(value)
