"""What a run found, in a few plain sentences for a reader who knows none of the measures' names; page, terminal and card share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from libmtl_fair import metrics
from libmtl_fair.report import judged
from libmtl_fair.report.competitors import dominated, lacking
from libmtl_fair.report.run_folder import Row, RunFolder, damage_named, rows
from libmtl_fair.report.summary import LABELS, column_of, shrinkage_verdict, summary

_FIRST = 3
"""So many methods are told one by one; the others are named."""
_FEW_SEEDS = 5
_POINTS = 0.005
"""A utility that falls by less is not told."""
_TOLD = ("auc", "accuracy", "f1", "r2")
_NOTHING = (
    "No method makes groups, or people who are alike, more alike in a way that anybody gains from by more than chance."
)
_UNJUDGED = (
    "No group was judged: none of the tasks has yes-or-no decisions. How the groups' errors differ, task by task, is under "
    '"By group".'
)
_NOT_ALIKE = "No method makes people who are alike more alike by more than chance."
Finding = tuple[str, str]


class _Told(NamedTuple):
    """What one method improved, for groups and for like people, and cost, in sentences; the changes; whether it levels down."""

    improved: str
    alike: str
    cost: str
    fall: float
    apart: float
    down: bool


@damage_named
def findings(run: RunFolder) -> list[Finding]:
    """Return (what it is about, sentences): what was compared, what improved, what it cost whom, what says nothing, how sure it is."""
    return run.once("findings", lambda: list(_findings(run)))


def _findings(run: RunFolder) -> Iterator[Finding]:
    yield "What was compared", _compared(run)
    others, told = run.methods[1:], _told(run)
    improved = [text for each in told.values() if (text := " ".join(filter(None, (each.improved, each.alike))))]
    if others:
        yield "What improved", _first(improved) if improved else _nothing(run)
    cost = [text for each in told.values() if (text := each.cost)]
    if others and (cost or improved):
        yield (
            "What it cost",
            _first(cost) or f"No group of enough people and no task loses more than chance against {run.reference}.",
        )
    if nothing_said := [*_degenerate(run), *_shrunk(run), *_no_gap(run), *_too_few(run)]:
        yield "What says nothing", " ".join(nothing_said)
    yield "How far to trust it", " ".join(filter(None, (*_competitors(run), *_certainty(run))))


def headline(run: RunFolder) -> list[Finding]:
    """Return three findings for a first screen: what was compared; what improved, for whom and how surely; what it cost whom.

    Of many methods one is told, that with the largest fall of a gap between groups, else of the distance between like people;
    the others are named or counted, so that the sentences stay as long as they are.
    """
    told = _told(run)
    yielded = [("Compared", _compared(run, _FIRST))]
    if not told:
        return yielded
    best = min((m for m in told if told[m].improved), key=lambda m: told[m].fall, default=None)
    like = min((m for m in told if told[m].alike), key=lambda m: told[m].apart, default=None)
    shown = best or like
    gain = told[shown].improved or told[shown].alike if shown else _nothing(run)
    more = {"groups": [m for m in told if told[m].improved], "like people": [m for m in told if told[m].alike]}
    also = [f"{_names([m for m in ms if m != shown], _FIRST)} ({whom})" for whom, ms in more.items() if {*ms} - {shown}]
    yielded.append(("Improved", gain + (f" So do, for some: {'; '.join(also)}." if shown and also else "")))
    none = f"Under {shown} no group of enough people and no task loses more than chance against {run.reference}."
    payer = shown or next((m for m in told if told[m].cost), None)
    cost = (told[payer].cost if payer else "") or (none if shown else "")
    down = [m for m in told if told[m].down and m != payer]
    nothing = [m for m in told if m in judged.why_degenerate(run)]
    others = [f"{_names(down, _FIRST)} level{'s' * (len(down) == 1)} down: nobody gains."] if down else []
    if nothing:
        one = "the same answer for (nearly) all in some task"
        others.append(f"{_names(nothing, _FIRST)} give{'s' * (len(nothing) == 1)} {one}, which no gap can judge.")
    text = " ".join(filter(None, (cost, *others)))
    return [*yielded, ("Cost", text)] if text else yielded


def _told(run: RunFolder) -> dict[str, _Told]:
    """Return what is said of each method beside the reference."""
    return run.once("told", lambda: {method: _of_method(run, method) for method in run.methods[1:]})


def _nothing(run: RunFolder) -> str:
    """Say that nothing improved, of what was looked at."""
    if judged.decisions(run) or run.frame("groups").empty:
        return _NOTHING
    return _UNJUDGED if run.frame("consistency").empty else f"{_UNJUDGED} {_NOT_ALIKE}"


def _first(texts: list[str]) -> str:
    more = len(texts) - _FIRST
    return " ".join(texts[:_FIRST]) + (f" So for {more} more: see the tables." if more > 0 else "")


def _compared(run: RunFolder, most: int = 8) -> str:
    tasks = [t for t in dict.fromkeys(run.frame("utility")["task"]) if t != "macro"]
    found = judged.decisions(run)
    sizes = dict[str, int]()
    for d in found:
        unit = judged.steps_of(run, [d.task])
        sizes[unit] = max(sizes.get(unit, 0), *(int(counts.to_numpy().sum()) for counts in d.by_seed.values()))
    attributes = list(dict.fromkeys(d.attribute for d in found))
    if not found:  # no decisions
        counted = run.frame("groups").query("metric == 'count' and group == 'overall'")
        sizes = {"examples": int(counted["n"].max())} if len(counted) else sizes
        attributes = list(dict.fromkeys(counted["attribute"]))
    which = "".join(f"{' and' * bool(i)} {n:,} {unit}" for i, (unit, n) in enumerate(sorted(sizes.items())))
    held = "that no training saw" if run.split == "test" else "of validation, which also chose the models"
    others = (
        f"{_names(run.methods[1:], most)} with {run.reference}, the reference" if run.methods[1:] else run.reference
    )
    groups = f", by groups of {_names(attributes)}" if attributes else ""
    whom = f"on{which} {held}" if which else f"on data {held}"
    return f"{others}, in {len(tasks)} task{'s' * (len(tasks) > 1)} ({_names(tasks)}), {whom}{groups}."


def _names(items: Iterable[object], most: int = 8) -> str:
    names = [str(item) for item in items]
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _of_method(run: RunFolder, method: str) -> _Told:
    """Return what a method improved, and what it cost: at the recipe's threshold, or where nothing is to be said there at the other."""
    cells = summary(run)
    own = [*rows(cells[(cells["method"] == method) & cells["column"].str.startswith("EO diff")])]
    for end in (*judged.thresholds(run), ""):
        here = [row for row in own if column_of(row.column)[2] == end]
        gains, downs = [row for row in here if row.gain], [row for row in here if row.down and not row.why]
        if gains or downs:
            break
    pays = judged.who_pays(run, end)
    pays = pays[(pays["method"] == method) & pays["d_tpr"].notna()]
    costs = [*_utility_falls(run, method)]
    if not downs and method not in judged.why_degenerate(run, end):
        lost = pays[pays["d_tpr"] < -judged.SURE * pays["se_tpr"]].sort_values("d_tpr")
        costs += [_most(lost)] if len(lost) else []
    down = _down(method, end, downs, pays) if downs else ""
    cost = f"{method} costs: {'; '.join(costs)}." if costs else ""
    alike, apart = _alike(run, method)
    return _Told(
        _gain(run, method, end, gains, pays) if gains else "",
        alike,
        " ".join(filter(None, (down, cost))),
        min((float(row.difference) for row in gains), default=0.0),
        apart,
        bool(downs),
    )


def _gain(run: RunFolder, method: str, end: str, gains: list[Row], pays: pd.DataFrame) -> str:
    cells = summary(run).set_index(["method", "column"])["mean"]
    falls = []
    for row in gains:
        sure = f" (95 % interval of the change over {int(row.pairs)} seeds: {row.low:+.3f} to {row.high:+.3f})"
        before = cells[run.reference, row.column]
        falls.append(
            f"by {column_of(row.column)[1]} from {before:.3f} to {row.mean:.3f}{sure if row.low == row.low else ''}"
        )
    up = pays[pays["attribute"].isin([column_of(row.column)[1] for row in gains])]
    up = up[up["d_tpr"] > judged.SURE * up["se_tpr"]].sort_values("d_tpr", ascending=False)
    who = _most(up) or "fewer people of some group are decided wrongly"
    return (
        f"{method} treats groups more alike{_at(end)}: the largest gap in how often they rightly or wrongly get a yes falls "
        f"{_names(falls)}; {who}."
    )


def _alike(run: RunFolder, method: str) -> tuple[str, float]:
    """Say where like people get more alike ranks, for sure over seeds; and by how much."""
    cells = summary(run)
    found = {row.method: row for row in rows(cells[cells["column"] == "inconsistency"])}
    if method not in found or not found[method].high < 0 or method in judged.why_degenerate(run):
        return "", 0.0
    own = found[method]
    text = (
        f"{method} treats like people more alike: their ranks are {own.mean:.1%} instead of {found[run.reference].mean:.1%} as far apart "
        f"as those of any two people (95 % interval of the change over {int(own.pairs)} seeds: {own.low:+.3f} to {own.high:+.3f})."
    )
    return text, float(own.difference)


def _down(method: str, end: str, downs: list[Row], pays: pd.DataFrame) -> str:
    tasks = {(column_of(row.column)[1], task) for row in downs for task in row.down.split(", ")}
    fallen = pays[[key in tasks for key in zip(pays["attribute"], pays["task"])]].sort_values("d_tpr")
    falls = _most(fallen[fallen["d_tpr"] < 0])
    return (
        f"{method} levels down by {_names(dict.fromkeys(column_of(row.column)[1] for row in downs))}{_at(end)}: gaps shrink because those "
        f"who should get a yes get it less often, and nobody's share rises by more than chance ({falls})."
    )


def _most(moved: pd.DataFrame) -> str:
    """Say of each group where it moved the most, of at most three groups, in the order given."""
    return "; ".join(map(_moved, rows(moved.drop_duplicates(["attribute", "group"])[:_FIRST])))


def _moved(row: Row) -> str:
    """Say what became of the people of one group that should get a yes."""
    whom, that = ("the steps of ", "that") if row.unit == "steps" else ("", "who")
    group = f"{whom}{row.group} ({row.attribute}) {that} should get a yes"
    return f"in {row.task}, {row.tpr:.0%} instead of {row.tpr_before:.0%} of {group} do"


def _counted(run: RunFolder) -> str:
    return judged.steps_of(run, (d.task for d in judged.decisions(run)))


def _at(end: str) -> str:
    return ", when as many get a yes as should" if end else ""


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
    yield from (f"{method} is no decision to be judged: {found[method]}." for method in list(found)[:_FIRST])
    if len(found) > _FIRST:
        yield f"So are {_names(list(found)[_FIRST:])}."
    if found:
        yield "A gap between groups that all get the same answer is no fairness."
    if found and len(found) == len(run.methods) and judged.decisions(run, judged.BASE_RATE):
        yield "Look at the columns of the base rate, where as many get a yes as should."


def _shrunk(run: RunFolder) -> Iterator[str]:
    cells = summary(run)
    lower = {(row.method, row.column) for row in rows(cells) if row.difference < 0}
    verdicts = (
        row for row in rows(shrinkage_verdict(run)) if not row.below and (row.method, f"Bias@{row.delta_name}") in lower
    )
    found = list(dict.fromkeys(row.method for row in verdicts))
    if found:
        yield (
            f"Under {_names(found)}, scores of different tasks lie closer together (Bias), but no closer than drawing all scores of "
            f"{run.reference} towards one value brings them: nobody gains from that."
        )


def _no_gap(run: RunFolder) -> Iterator[str]:
    cells = summary(run)
    cells = cells[cells["column"].str.startswith("EO diff") & (cells["method"] == run.reference) & (cells["why"] == "")]
    none = cells[cells["p"] > 0.05]
    ends = none["column"].map(lambda column: column_of(column)[2])
    for end, part in none.groupby(ends, sort=False):
        groups = [f"groups of {column_of(column)[1]}" for column in part["column"]]
        when = f"{_at(str(end))}," if end else ""
        yield (
            f"Between {_names(groups)}{when} the largest gap of {run.reference} is not distinguishable from none: chance makes "
            "one as large."
        )


def _too_few(run: RunFolder) -> Iterator[str]:
    found = judged.left_out(run)
    if found:
        more = f", and {len(found) - _FIRST} more" if len(found) > _FIRST else ""
        yield f"Too few {_counted(run)} to be judged, and in no gap: {', '.join(found[:_FIRST])}{more}."


def _competitors(run: RunFolder) -> Iterator[str]:
    """Say which methods a simple competitor beats; the numbers stand in the table of competitors."""
    found = dominated(run)
    if found.empty or found["seeds"].max() < 2:
        yield from filter(
            None, [lacking(run) if found.empty else "One seed: nothing can be said of simple competitors."]
        )
        return
    what = {True: "in how alike like people are treated", False: "between groups"}
    found = found.assign(what=(found["measure"] == "inconsistency").map(what))
    beaten = {str(method): part for method, part in found[found["dominated"]].groupby("method", sort=False)}
    for method, part in list(beaten.items())[:_FIRST]:
        by = part.groupby("what", sort=False)["competitor"].unique()
        told = "; ".join(f"{what} by {_names(names)}" for what, names in by.items())
        yield (
            f"{method} is beaten by what is simpler ({told}): as useful or more, with a gap as small or smaller, and one of them "
            "clearly, on the same people."
        )
    if others := [method for method in dict.fromkeys(found["method"]) if method not in list(beaten)[:_FIRST]]:
        more = [method for method in others if method in beaten]
        yield f"So {'are' if len(more) > 1 else 'is'} {_names(more)}." if more else ""
        level = [method for method in others if method not in beaten]
        yield f"No simple competitor is shown to beat {_names(level)}." if level else ""


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
        narrow = (
            ", never leave the range of the differences seen, and are too narrow with so few"
            if seeds < _FEW_SEEDS
            else ""
        )
        yield f"{seeds} seeds, {split}; intervals are over seeds{narrow}."
