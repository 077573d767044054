"""What a run found, in a few plain sentences for a reader who knows none of the measures' names; page, terminal and card share them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from libmtl_fair import metrics
from libmtl_fair.report import judged
from libmtl_fair.report.run_folder import RunFolder, rows
from libmtl_fair.report.summary import LABELS, column_of, shrinkage_verdict, summary

_FIRST = 3
"""So many methods are told one by one; the others are named."""
_POINTS = 0.005
"""A utility that falls by less is not told."""
_TOLD = ("auc", "accuracy", "f1", "r2")
Finding = tuple[str, str]


def findings(run: RunFolder) -> list[Finding]:
    """Return (what it is about, sentences): what was compared, what improved, what it cost whom, what says nothing, how sure it is."""
    return run.once("findings", lambda: list(_findings(run)))


def _findings(run: RunFolder) -> Iterator[Finding]:
    yield "What was compared", _compared(run)
    others = run.methods[1:]
    told = {method: _of_method(run, method) for method in others}
    improved = [text for method in others if (text := told[method]["improved"])]
    if others:
        nothing = "No method makes groups more alike in a way that anybody gains from by more than chance."
        yield "What improved", _first(improved) if improved else nothing
    cost = [text for method in others if (text := " ".join(filter(None, (told[method]["down"], told[method]["cost"]))))]
    if others and (cost or improved):
        yield (
            "What it cost",
            _first(cost) or f"No group of enough people and no task loses more than chance against {run.reference}.",
        )
    if nothing_said := [*_degenerate(run), *_shrunk(run), *_no_gap(run), *_too_few(run)]:
        yield "What says nothing", " ".join(nothing_said)
    yield "How sure", " ".join(_certainty(run))


def _first(texts: list[str]) -> str:
    more = len(texts) - _FIRST
    return " ".join(texts[:_FIRST]) + (f" So for {more} more: see the tables." if more > 0 else "")


def _compared(run: RunFolder) -> str:
    tasks = [t for t in dict.fromkeys(run.frame("utility")["task"]) if t != "macro"]
    found = judged.decisions(run)
    people = max((int(counts.to_numpy().sum()) for d in found for counts in d.by_seed.values()), default=0)
    attributes = list(dict.fromkeys(d.attribute for d in found))
    which = f" {people:,} people" if people else ""
    held = "that no training saw" if run.split == "test" else "of validation, which also chose the models"
    others = f"{_names(run.methods[1:])} with {run.reference}, the reference" if run.methods[1:] else run.reference
    groups = f", by groups of {_names(attributes)}" if attributes else ""
    whom = f"on{which} {held}" if which else f"on data {held}"
    return f"{others}, in {len(tasks)} task{'s' * (len(tasks) > 1)} ({_names(tasks)}), {whom}{groups}."


def _names(items: Iterable[object], most: int = 8) -> str:
    names = [str(item) for item in items]
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _of_method(run: RunFolder, method: str) -> dict[str, str]:
    cells = summary(run)
    own = cells[(cells["method"] == method) & cells["column"].str.startswith("EO diff")]
    gains = [row for row in rows(own) if row.gain]
    downs = [row for row in rows(own) if row.down and not row.why]
    pays = judged.who_pays(run)
    pays = pays[pays["method"] == method]
    costs = [*_utility_falls(run, method)]
    if not any(row.down for row in downs):
        costs += [*_losses(pays)]
    cost = f"{method} costs: {'; '.join(costs)}." if costs else ""
    down = [_down(run, row) for row in downs]
    return {"improved": " ".join(_gain(run, row, pays) for row in gains), "down": " ".join(down), "cost": cost}


def _gain(run: RunFolder, row: Any, pays: pd.DataFrame) -> str:
    _, attribute, end = column_of(row.column)
    before = _mean(run, run.reference, row.column)
    sure = (
        f" (change {row.difference:+.3f}, 95 % interval over {int(row.pairs)} seeds {row.low:+.3f} to {row.high:+.3f})"
    )
    part = pays if not end else judged.who_pays(run, end).query("method == @row.method")
    part = part[(part["attribute"] == attribute) & (part["d_tpr"] > judged.SURE * part["se_tpr"])]
    best = [r for r in rows(part.sort_values("d_tpr", ascending=False))][:2]
    who = f" {_names(map(_moved, best))}." if best else " Fewer people of some group are decided wrongly."
    return (
        f"{row.method} treats groups of {attribute} more alike{_at(end)}: the largest gap in how often they rightly or wrongly get a "
        f"yes falls from {before:.3f} to {row.mean:.3f}{sure if row.low == row.low else ''}.{who}"
    )


def _moved(row: Any) -> str:
    """Say what became of the people of one group that should get a yes."""
    return f"in {row.task}, {row.tpr:.0%} instead of {row.tpr_before:.0%} of {row.group} ({row.attribute}) who should get a yes do"


def _at(end: str) -> str:
    return " at the base-rate threshold" if end else ""


def _mean(run: RunFolder, method: str, column: str) -> float:
    cells = summary(run)
    found = cells[(cells["method"] == method) & (cells["column"] == column)]["mean"]
    return float(found.iloc[0]) if len(found) else math.nan


def _down(run: RunFolder, row: Any) -> str:
    _, attribute, end = column_of(row.column)
    pays = judged.who_pays(run, end)
    tasks = row.down.split(", ")
    part = pays[(pays["method"] == row.method) & (pays["attribute"] == attribute) & pays["task"].isin(tasks)]
    fallen = part[part["d_tpr"] < 0].sort_values("d_tpr")
    falls = "; ".join(
        f"from {r.tpr_before:.0%} to {r.tpr:.0%} for {r.group} in {r.task}" for r in list(rows(fallen))[:3]
    )
    return (
        f"{row.method} levels down by {attribute}{_at(end)}: the gap shrinks because those who should get a yes get it less often "
        f"({falls}), and nobody's share rises by more than chance."
    )


def _losses(pays: pd.DataFrame) -> Iterator[str]:
    lost = pays[pays["d_tpr"] < -judged.SURE * pays["se_tpr"]].sort_values("d_tpr")
    for r in list(rows(lost))[:2]:
        yield _moved(r)


def _utility_falls(run: RunFolder, method: str) -> Iterator[str]:
    """Each task's utility that falls the most, where it falls by more than the seeds differ."""
    frame = run.frame("utility")
    frame = frame[(frame["task"] != "macro") & frame["metric"].isin(_TOLD)]
    wide = frame.pivot(index="seed", columns=["task", "metric", "method"], values="value").astype(float)
    fallen = []
    for task in dict.fromkeys(frame["task"]):
        found = []
        for name in _TOLD:
            before, after = (wide.get((task, name, m)) for m in (run.reference, method))
            if before is not None and after is not None:
                change = metrics.paired_difference(after, before)
                if change["mean"] < -_POINTS and not change["high"] >= 0:
                    fall = f"from {before.mean():.3f} to {after.mean():.3f}"
                    found.append((change["mean"], f"{LABELS.get(name, name)} of {task} falls {fall}"))
        fallen += [min(found)] if found else []
    yield from (text for _, text in sorted(fallen)[:3])


def _degenerate(run: RunFolder) -> Iterator[str]:
    found = judged.why_degenerate(run)
    for method in list(found)[:_FIRST]:
        yield (
            f"{method} is no decision to be judged: {found[method]}. A gap between groups that all get the same answer is no fairness."
        )
    if len(found) > _FIRST:
        yield f"So are {_names(list(found)[_FIRST:])}."
    if found and len(found) == len(run.methods) and judged.decisions(run, judged.BASE_RATE):
        yield "Look at the base-rate threshold, which says yes as often as there is a true yes."


def _shrunk(run: RunFolder) -> Iterator[str]:
    found = list(dict.fromkeys(row.method for row in rows(shrinkage_verdict(run)) if not row.below))
    if found:
        yield (
            f"Under {_names(found)}, scores of different tasks lie closer together (Bias), but no closer than drawing all scores of "
            f"{run.reference} towards one value brings them: nobody gains from that."
        )


def _no_gap(run: RunFolder) -> Iterator[str]:
    cells = summary(run)
    cells = cells[cells["column"].str.startswith("EO diff") & (cells["method"] == run.reference) & (cells["why"] == "")]
    none = [column_of(row.column) for row in rows(cells) if row.p > 0.05]
    if none:
        where = _names(f"{attribute}{_at(end)}" for _, attribute, end in none)
        yield f"Between groups of {where} a gap of {run.reference} is not distinguishable from none: chance alone makes one as large."


def _too_few(run: RunFolder) -> Iterator[str]:
    found = judged.left_out(run)
    if found:
        more = f", and {len(found) - _FIRST} more" if len(found) > _FIRST else ""
        yield f"Too few people to be judged, and in no gap: {', '.join(found[:_FIRST])}{more}."


def _certainty(run: RunFolder) -> Iterator[str]:
    seeds = len(run.seeds)
    if seeds == 1:
        yield "One seed: nothing shows how much of this another seed, or another split, would repeat."
    else:
        split = (
            "each with a split of its own"
            if (run.recipe.get("data") or {}).get("resplit")
            else "all of one split of the people"
        )
        narrow = ", and so few seeds make intervals too narrow" if seeds < 5 else ""
        yield f"{seeds} seeds, {split}; intervals are over seeds{narrow}."
