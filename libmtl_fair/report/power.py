"""What gap between groups a test set can see, and how many people it takes to see one: ``libmtl-fair power``."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import pandas as pd

from libmtl_fair.errors import RecipeError
from libmtl_fair.metrics.rates import DENOMINATOR, RATES, table_rates
from libmtl_fair.metrics.verdicts import counts_from_rows, enough, people_needed, smallest_gap
from libmtl_fair.report.judged import steps_of
from libmtl_fair.report.run_folder import RunFolder

SHOWN = {"TPR": "true_positive_rate", "FPR": "false_positive_rate", "selection": "selection_rate"}
"""Rates by the name they are shown under."""


class _Options(TypedDict):
    wanted: float
    confidence: float
    comparisons: int


def power_of_run(
    run: RunFolder, gap: float | None = None, *, wanted: float = 0.8, confidence: float = 0.95
) -> pd.DataFrame:
    """Return what the run's split can see of its reference model at base-rate decisions: a row for each binary task, attribute, rate.

    Columns: task, attribute, rate, level (the reference's rate over all groups; in older runs at their own threshold), groups (with
    enough people for it), people (behind the rate in the two smallest of them; of sequences steps), gap (the smallest seen between them
    with probability ``wanted``), and with ``gap`` also needed (people behind the rate in each group to see that). Pairs of groups share
    the error probability 1 - ``confidence``.
    NaN where fewer than two groups have enough people.
    """
    frame = run.frame("groups_base_rate")
    frame = run.frame("groups") if frame.empty else frame
    first = frame[(frame["method"] == run.reference) & (frame["seed"] == run.of(run.reference)[0].seed)]
    found = []
    for (task, attribute), rows in first.groupby(["task", "attribute"], sort=False):
        counts, steps = counts_from_rows(rows), " steps" * (steps_of(run, [task]) == "steps")
        for shown, metric in SHOWN.items() if len(counts) else ():
            table = counts[enough(counts, metric)].to_numpy(float)
            place, pairs = RATES.index(metric), max(1, math.comb(len(table), 2))
            level = float(table_rates(table.sum(0))[place])
            sizes = np.sort(table @ DENOMINATOR[place])[:2]
            options: _Options = {"wanted": wanted, "confidence": confidence, "comparisons": pairs}
            known = len(table) > 1 and 0 < level < 1
            seen = smallest_gap((sizes[0], sizes[1]), level, **options) if known else math.nan
            needed = float(people_needed(gap, level, **options)) if known and gap is not None else math.nan
            people = " and ".join(f"{size:.0f}{steps}" for size in sizes) if known else ""
            found.append((task, attribute, shown, level, len(table), people, seen, needed))
    columns = ["task", "attribute", "rate", "level", "groups", "people", "gap", "needed"]
    return pd.DataFrame(found, columns=columns).drop(columns=[] if gap is not None else ["needed"])


def power_of_numbers(
    gap: float | None,
    people: tuple[int, int] | None,
    rate: float = 0.5,
    base_rate: float | None = None,
    *,
    groups: int = 2,
    wanted: float = 0.8,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return people and gap for TPR, FPR and selection: those needed to see ``gap``, or the gap that two groups of ``people`` show.

    ``people`` are rows where ``base_rate`` (the share of positives) is given, else those behind the rate: positives for TPR, negatives
    for FPR. Columns: rate, people (behind the rate in each group), rows (NaN without ``base_rate``), gap.

    Raises
    ------
    RecipeError
        Neither or both of gap and people, or numbers out of range.
    """
    if (gap is None) == (people is None):
        raise RecipeError("power needs a run folder, --gap (people needed), or --people twice (the gap that they show)")
    if groups < 2 or (base_rate is not None and not 0 < base_rate < 1):
        raise RecipeError(f"power needs two groups at least and a base rate in (0, 1), found {groups} and {base_rate}")
    options: _Options = {"wanted": wanted, "confidence": confidence, "comparisons": math.comb(groups, 2)}
    shares = {"TPR": base_rate, "FPR": None if base_rate is None else 1 - base_rate, "selection": base_rate and 1.0}
    found = []
    for name, share in shares.items():
        if gap is not None:
            n = people_needed(gap, rate, **options)
            found.append((name, f"{n}", math.nan if share is None else math.ceil(n / share), gap))
        elif people is not None:
            a, b = (count * (share or 1.0) for count in people)
            seen = smallest_gap((a, b), rate, **options)
            found.append((name, f"{a:.0f} and {b:.0f}", math.nan if share is None else sum(people), seen))
    return pd.DataFrame(found, columns=["rate", "people", "rows", "gap"])
