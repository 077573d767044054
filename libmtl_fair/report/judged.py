"""A run's decisions, judged by the people behind them: counts by group, gaps of enough people, degenerate answers, who pays.

Everything follows from the rates in ``metrics.json`` (:mod:`libmtl_fair.metrics.verdicts`), whatever made them. Of several seeds
the counts are averaged: seeds add no people, so what is said of people rests on those of one split (conservative where every seed
has its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.metrics import verdicts
from libmtl_fair.report.run_folder import RunFolder, rows

BASE_RATE = ", base rate"
"""How columns end that are of decisions at the base-rate threshold, which validation data chose."""
SURE = 1.96
"""Standard errors that a change must exceed to be said (95 %, two-sided)."""
NO_GROUP = frozenset({"difference", "ratio", "overall"})
"""Names that stand where a group's name would, for what compares groups and for all of them together."""
METRICS = ("equalized_odds", "demographic_parity", "equal_opportunity")
"""Gaps of decisions between groups with enough people."""
_LABEL = r"^base_rate(?:\[(.*)\])?$"
Counts = NDArray[np.float64]


@dataclass(frozen=True)
class Decisions:
    """One method's decisions on one task (or one label of it) for the groups of one attribute: counts [G, 4] by seed."""

    method: str
    task: str
    label: str
    attribute: str
    by_seed: dict[int, pd.DataFrame]
    min_group_size: int

    @cached_property
    def mean(self) -> pd.DataFrame:
        """Counts of all seeds, averaged and rounded; groups in order of appearance.

        True labels are rounded as sums: of one split they are the same for all seeds, and stay.
        """
        counts = pd.concat(self.by_seed.values()).groupby(level=0, sort=False).mean()
        yes = counts[["fp", "tp"]].round()
        negatives, positives = (counts["tn"] + counts["fp"]).round(), (counts["fn"] + counts["tp"]).round()
        made = {"tn": negatives - yes["fp"], "fp": yes["fp"], "fn": positives - yes["tp"], "tp": yes["tp"]}
        return pd.DataFrame(made)[list(verdicts.CELLS)]

    def gap(self, metric: str, seed: int | None = None, n_permutations: int = 0) -> verdicts.GapVerdict:
        """Return the largest difference between groups with enough people, of one seed or of the averaged counts."""
        counts = self.mean if seed is None else self.by_seed[seed]
        sizes = {"min_group_size": self.min_group_size, "n_bootstrap": 0, "n_permutations": n_permutations}
        return verdicts.judge(counts, metric, **sizes)


def decisions(run: RunFolder, end: str = "") -> list[Decisions]:
    """Return the counts behind the table ``groups``, or with ``end`` :data:`BASE_RATE` behind ``groups_base_rate``."""
    return run.once(f"decisions{end}", lambda: list(_decisions(run, end)))


def _decisions(run: RunFolder, end: str) -> Iterator[Decisions]:
    frame = run.frame("groups_base_rate" if end else "groups")
    frame = frame[~frame["group"].isin(NO_GROUP)]
    smallest = int((run.recipe.get("metrics") or {}).get("min_group_size", 30))
    names = frame["metric"].str.extract(_LABEL, expand=False).fillna("")
    for label in dict.fromkeys(names[frame["metric"].str.match(_LABEL)]):
        suffix = f"[{label}]" if label else ""
        own = frame[
            frame["metric"].isin([f"{m}{suffix}" for m in ("base_rate", "true_positive_rate", "false_positive_rate")])
        ]
        # One call for all: each group of each model is a group of its own to it.
        keys = ["method", "task", "attribute", "seed", "group"]
        found = verdicts.counts_from_rows(own.assign(group=own.groupby(keys, sort=False).ngroup().astype(str)), label)
        named = own.drop_duplicates(keys)[keys].reset_index(drop=True).join(found.reset_index(drop=True))
        for (method, task, attribute), part in named.groupby(keys[:3], sort=False):
            seeds = part.groupby("seed", sort=False)
            counts = {int(str(seed)): one.set_index("group")[list(verdicts.CELLS)] for seed, one in seeds}
            yield Decisions(str(method), str(task), label, str(attribute), counts, smallest)


def steps_of(run: RunFolder, tasks: Iterable[object]) -> str:
    """Return what the decisions on these tasks are about: "people", of tasks with a decision at every step "steps", or of both kinds."""
    asked = set(tasks)
    kinds = {
        "steps" if entry.get("kind") == "binary_sequence" else "people"
        for name, entry in (run.data_card.get("tasks") or {}).items()
        if name in asked
    }
    return " or ".join(sorted(kinds)) or "people"


def thresholds(run: RunFolder) -> list[str]:
    """Return the ends of columns for which the run has decisions: ``""`` (the recipe's threshold) and :data:`BASE_RATE`."""
    return [end for end in ("", BASE_RATE) if decisions(run, end)]


def gaps(run: RunFolder, end: str = "") -> pd.DataFrame:
    """Return method, seed, task, binary, attribute, metric, value: the gap between groups with enough people.

    Of several labels or classes the worst; AUC, MAE and KS too, at the recipe's threshold.
    """
    return run.once(f"gaps{end}", lambda: _gaps(run, end))


def _gaps(run: RunFolder, end: str) -> pd.DataFrame:
    columns = ["method", "seed", "task", "attribute", "metric"]
    made = [
        (d.method, seed, d.task, d.attribute, metric, not d.label, d.gap(metric, seed).value)
        for d in decisions(run, end)
        for seed in d.by_seed
        for metric in METRICS
    ]
    further = [] if end else list(_further(run))
    found = pd.DataFrame([*made, *further], columns=[*columns, "binary", "value"])
    return found.groupby(columns, sort=False).agg({"binary": "all", "value": "max"}).reset_index()


def _further(run: RunFolder) -> Iterator[tuple[object, ...]]:
    """Gaps of AUC and MAE between groups that are not flagged; of KS as recorded, where no group is."""
    frame = run.frame("groups")
    of_groups = ~frame["group"].isin(NO_GROUP)
    taken = frame[(frame["flag"] == "") & of_groups & frame["metric"].isin(["auc", "mae"])]
    for key, values in taken.groupby(["method", "seed", "task", "attribute", "metric"], sort=False)["value"]:
        yield *key, False, float(np.ptp(values)) if len(values) > 1 else math.nan
    keys = ["method", "seed", "task", "attribute"]
    small = set(frame[frame["flag"].isin(["small", "few"]) & of_groups].groupby(keys).groups)
    for row in rows(frame[(frame["metric"] == "ks") & (frame["group"] == "difference")]):
        key = (row.method, row.seed, row.task, row.attribute)
        yield *key, "ks", False, math.nan if key in small or row.flag else row.value


def degenerate(run: RunFolder, end: str = "") -> pd.DataFrame:
    """Return method, seed, task, why: every binary decision that is none, in words (:func:`verdicts.degenerate`)."""
    return run.once(f"degenerate{end}", lambda: _degenerate(run, end))


def _degenerate(run: RunFolder, end: str) -> pd.DataFrame:
    half = not end and (run.recipe.get("metrics") or {}).get("threshold", 0.5) == 0.5
    whole: dict[tuple[str, int, str], pd.DataFrame] = {}
    for d in decisions(run, end):
        for seed, counts in d.by_seed.items() if not d.label else ():
            key = (d.method, seed, d.task)
            if key not in whole or counts.to_numpy().sum() > whole[key].to_numpy().sum():
                whole[key] = counts
    found = [(*key, verdicts.degenerate(counts, half=half)) for key, counts in whole.items()]
    return pd.DataFrame([row for row in found if row[-1]], columns=["method", "seed", "task", "why"])


def degenerate_tasks(run: RunFolder, end: str = "") -> dict[tuple[str, str], str]:
    """Return (method, task) -> why its decision is none, with the number of seeds where it is not all."""
    found: dict[tuple[str, str], str] = {}
    for (method, task), own in degenerate(run, end).groupby(["method", "task"], sort=False):
        seeds = len(run.of(str(method)))
        often = "" if len(own) == seeds else f" in {len(own)} of {seeds} seeds"
        found[str(method), str(task)] = f"{own['why'].iloc[0]}{often}"
    return found


def why_degenerate(run: RunFolder, end: str = "") -> dict[str, str]:
    """Return method -> which of its decisions are none and why, of those that have one."""
    found: dict[str, list[str]] = {}
    for (method, task), why in degenerate_tasks(run, end).items():
        found.setdefault(method, []).append(f"{task} {why}")
    return {method: "; ".join(each) for method, each in found.items()}


def levelled_down(run: RunFolder, end: str = "") -> dict[tuple[str, str], list[str]]:
    """Return (method, attribute) -> the binary tasks in which the method levels down against the reference."""
    found: dict[tuple[str, str], list[str]] = {}
    for d, reference in _beside_reference(run, end):
        before = reference.mean.reindex(d.mean.index).fillna(0)
        if verdicts.levels_down(before, d.mean, min_group_size=d.min_group_size):
            found.setdefault((d.method, d.attribute), []).append(d.task)
    return found


def _beside_reference(run: RunFolder, end: str) -> Iterator[tuple[Decisions, Decisions]]:
    own = [d for d in decisions(run, end) if not d.label]
    reference = {(d.task, d.attribute): d for d in own if d.method == run.reference}
    for d in own:
        if d.method != run.reference and (d.task, d.attribute) in reference:
            yield d, reference[d.task, d.attribute]


def p_values(run: RunFolder, end: str = "") -> dict[tuple[str, str, str], float]:
    """Return (method, attribute, metric) -> p-value of "no gap in any binary task" (Bonferroni over tasks)."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for d in decisions(run, end):
        for metric in ("equalized_odds", "demographic_parity") if not d.label else ():
            found.setdefault((d.method, d.attribute, metric), []).append(d.gap(metric, n_permutations=1000).p)
    known = {key: [p for p in each if p == p] for key, each in found.items()}
    return {key: min(1.0, min(each) * len(each)) for key, each in known.items() if each}


def who_pays(run: RunFolder, end: str = "") -> pd.DataFrame:
    """Return what changes for each group against the reference, on the same people, and its standard error.

    Returns
    -------
    DataFrame
        One row a method, binary task, attribute and group with enough people: method, task, attribute, group, n,
        positives, negatives, and for each of selection, tpr, fpr, error: ``<name>_before``, ``<name>``, ``d_<name>``,
        ``se_<name>``; unit, what n counts: "people" or "steps".
    """
    return run.once(f"who_pays{end}", lambda: _who_pays(run, end))


_RATES = ("selection", "tpr", "fpr", "error")


def _who_pays(run: RunFolder, end: str) -> pd.DataFrame:
    heads = ["method", "task", "attribute", "group", "n", "positives", "negatives"]
    heads += [f"{name}{which}" for name in _RATES for which in ("_before", "")]
    heads += [*(f"{part}_{name}" for part in ("d", "se") for name in _RATES), "unit"]
    made = []
    for d, reference in _beside_reference(run, end):
        after, before = d.mean, reference.mean.reindex(d.mean.index).fillna(0)
        sure = verdicts.enough(after, min_group_size=d.min_group_size)
        moved, values = verdicts.changes(before, after), [_rates(before), _rates(after)]
        for g in np.flatnonzero(sure).tolist():
            tn, fp, fn, tp = after.iloc[g]
            both = [v[name][g] for name in _RATES for v in values]
            changed = [getattr(moved, f"{part}_{name}")[g] for part in ("d", "se") for name in _RATES]
            sizes = (tn + fp + fn + tp, fn + tp, tn + fp)
            unit = steps_of(run, [d.task])
            made.append((d.method, d.task, d.attribute, after.index[g], *sizes, *both, *changed, unit))
    return pd.DataFrame(made, columns=heads)


def _rates(counts: pd.DataFrame) -> dict[str, Counts]:
    tn, fp, fn, tp = counts.to_numpy(float).T
    with np.errstate(divide="ignore", invalid="ignore"):
        n = tn + fp + fn + tp
        return {"selection": (fp + tp) / n, "tpr": tp / (fn + tp), "fpr": fp / (tn + fp), "error": (fp + fn) / n}


def left_out(run: RunFolder) -> list[str]:
    """Return the groups that have too few people, or steps of them, to be judged, with their numbers: said once a group and attribute."""
    found: dict[tuple[str, str], list[str]] = {}
    most: dict[tuple[str, str], dict[str, int]] = {}
    for d in decisions(run):
        if d.method == run.reference and not d.label:
            for g in np.flatnonzero(~verdicts.enough(d.mean, min_group_size=d.min_group_size)).tolist():
                tn, fp, fn, tp = d.mean.iloc[g].astype(int)
                if tn + fp + fn + tp:
                    key, unit = (d.attribute, str(d.mean.index[g])), steps_of(run, [d.task])
                    sizes = most.setdefault(key, {})
                    sizes[unit] = max(sizes.get(unit, 0), tn + fp + fn + tp)
                    steps = " steps" if unit == "steps" else ""
                    found.setdefault(key, []).append(f"{d.task} {fn + tp}{steps} with a true yes, {tn + fp} with a no")
    size = {key: " and ".join(f"{n} {unit}" for unit, n in sorted(sizes.items())) for key, sizes in most.items()}
    return [f"{a} = {g} ({size[a, g]}: {_first(each)})" for (a, g), each in found.items()]


def _first(each: Sequence[str], most: int = 4) -> str:
    more = [f"so in {len(each) - most} more tasks"] if len(each) > most + 1 else []
    return "; ".join([*each[:most], *more] if more else each)


def accuracy_noise(run: RunFolder, end: str = "") -> dict[tuple[str, str], float]:
    """Return (method, task) -> noise of its accuracy against the reference's: :data:`SURE` standard errors of the paired difference.

    As little as the counts allow: the two differ on at least |change of tp| + |change of fp| people (ours).
    """
    found: dict[tuple[str, str], float] = {}
    for d, reference in _beside_reference(run, end):
        (tn, fp, _, tp), n = (d.mean.sum() - reference.mean.sum()), float(d.mean.to_numpy().sum())
        if not n:  # nobody whose group is known
            continue
        differ, gained = (abs(tp) + abs(fp)) / n, (tp + tn) / n
        noise = SURE * math.sqrt(max(differ - gained**2, 0.0) / n)
        found[d.method, d.task] = min(noise, found.get((d.method, d.task), math.inf))
    return found
