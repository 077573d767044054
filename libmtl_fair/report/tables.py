"""Tables of a run: for the page and the card as plain rows of text, so that both show the same; and for the console."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from libmtl_fair.arrays import records
from libmtl_fair.files import Json
from libmtl_fair.report import judged, notes
from libmtl_fair.report import summary as numbers
from libmtl_fair.report.run_folder import Row, RunFolder, SeedRun, damage_named, rows

GAPS = (*numbers.GAPS, "mean EO diff", "mean DP diff")
"""How columns of the summary begin that compare groups."""
NOTHING, DOWN, NONE = "⚠", "▽", "≈0"
"""Marks: the number says nothing (a degenerate decision), the method levels down, no gap that chance would not make."""
MARKS = f"{NOTHING} says nothing: a decision is (nearly) the same for all; {DOWN} levels down: nobody gains; {NONE} no gap beyond chance"

PEOPLE = (
    "Inconsistency: how far apart in rank like people are, in units of any two people; 0: like people are always ranked alike, 1: the "
    "model knows nothing of who is like whom. It does not change when scores are shrunk. Then split by pairs of equal and of different "
    "sensitive value. Calibrated: of the rate of positives at each rank. Over .1: share of pairs further apart than that in rank. "
    "Decisions: pairs with different decisions, in units of any two people. Flip gap: how far a person's rank moves when "
    "the sensitive value among the inputs is exchanged. Profile: whether like people differ in which task they rank high. "
    "Small: 95 % interval over people. Values depend on the number of people and of near others: compare within one run."
)


@dataclass(frozen=True)
class Cell:
    """Text of a cell, smaller text below it, whether it is the best of its column, and its tone: good or bad for people, or neither."""

    text: str
    small: str = ""
    best: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: title, column heads, rows of cells (the first one names the row)."""

    title: str
    heads: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]
    note: str = ""


def show(mean: float, sd: float = math.nan, digits: int = 3, sign: str = "") -> str:
    """Write a number, with its sd where there is one.

    >>> show(0.83251, 0.0021), show(0.5), show(float("nan"))
    ('0.833 ± 0.002', '0.500', '–')
    """
    if not math.isfinite(mean):
        return "–"
    digits = digits if abs(mean) < 100 else 1
    return f"{mean:{sign}.{digits}f}" + (f" ± {sd:.{digits}f}" if math.isfinite(sd) else "")


def sheet(
    title: str, heads: Sequence[str], frame: pd.DataFrame, note: str = "", digits: int = 4, sign: str = ""
) -> Sheet:
    """Make a table of a frame's columns, in their order.

    Numbers have ``digits``, those with a column ``<name>_sd`` their sd behind them; True is "yes"; cells and texts stay.
    """

    def cell(row: Json, name: str) -> Cell:
        value = row[name]
        if isinstance(value, Cell):
            return value
        if isinstance(value, float):
            return Cell(show(value, row.get(f"{name}_sd", math.nan), digits, sign))
        return Cell(("yes" if value else "no") if isinstance(value, bool) else str(value))

    names = [str(name) for name in frame if not str(name).endswith("_sd")]
    body = (tuple(cell(row, name) for name in names) for row in records(frame))
    return Sheet(title, tuple(heads), tuple(body), note)


def summary_sheet(
    run: RunFolder,
    title: str,
    prefixes: tuple[str, ...],
    note: str = "",
    cells: pd.DataFrame | None = None,
    only: Sequence[str] | None = None,
) -> Sheet | None:
    """Columns of the summary that start with one of ``prefixes``: a row a method, small the difference; None if none do.

    ``cells`` of a comparison show the difference's interval too; with ``only`` some methods marks are not put in words.
    """
    taken = numbers.summary(run) if cells is None else cells
    taken = taken[taken["column"].str.startswith(prefixes)]
    columns = list(dict.fromkeys(taken["column"]))
    made = []
    for r in rows(taken):
        difference = show_difference(r) if cells is not None else show(r.difference, sign="+").strip("–")
        text = " ".join(filter(None, (show(r.mean, r.sd), "".join(remarks(r)))))
        small = "; ".join(filter(None, (difference, *(remarks(r).values() if only is None else ()))))
        made.append(Cell(text, small, bool(r.best), "good" if r.gain else ""))
    wide = taken.assign(cell=pd.Series(made, index=taken.index, dtype=object)).pivot(
        index="method", columns="column", values="cell"
    )
    wide = wide.reindex(index=run.methods if only is None else list(only), columns=columns)
    wide = wide.rename_axis(index="method").reset_index()
    return sheet(title, ["method", *columns], wide, note) if columns else None


def remarks(row: Row) -> dict[str, str]:
    """Return the marks of a cell of the summary, and what each says in words."""
    if row.why:
        return {NOTHING: f"says nothing: {row.why}"}
    down = {DOWN: f"levels down in {row.down}"} if row.down else {}
    return down | ({NONE: f"not distinguishable from none (p = {row.p:.2f})"} if row.p > 0.05 else {})


_GLANCE = 8
"""So many methods stand in the first screen's table; the whole table follows below."""


def glance_sheet(run: RunFolder) -> Sheet | None:
    """One table for the first screen: the first utility and the gaps of yes/no decisions, or of numbers; why is told further down.

    Methods of whom no gap says anything are named under it, and so are those beyond eight, gains first.
    """
    utility = numbers.main_utility(numbers.summary_values(run))
    cells, gaps = numbers.summary(run), ("EO diff", "mean EO diff", "KS")
    compared = cells[cells["column"].str.startswith(gaps)]
    empty = {m for m, part in compared.groupby("method", sort=False) if (part["why"] != "").all()} - {run.reference}
    gains = set(compared[compared["gain"]]["method"])
    order = [run.reference, *sorted((m for m in run.methods[1:] if m not in empty), key=lambda m: m not in gains)]
    shown, more = order[:_GLANCE], order[_GLANCE:]
    said = [
        f"Left out, because no gap of theirs says anything ({NOTHING}): {', '.join(m for m in run.methods if m in empty)}."
        if empty
        else "",
        f"And {', '.join(more)}." if more else "",
        "All methods, and why: Group fairness." if empty or more else "",
    ]
    return summary_sheet(
        run, "At a glance", (*filter(None, (utility,)), *gaps), " ".join(filter(None, said)), only=shown
    )


def show_difference(row: Row) -> str:
    """Write a paired difference to the reference with its interval; nothing where there is none."""
    interval = f" [{row.low:+.4f}, {row.high:+.4f}]" if row.low == row.low else ""
    return f"{row.difference:+.4f}{interval}" if row.difference == row.difference else ""


def task_sheet(run: RunFolder) -> Sheet:
    """Utility of every task."""
    frame = run.frame("utility")
    means = numbers.with_sd(frame[frame["task"] != "macro"], ["task", "method", "metric"], ["value"])
    tasks, names = list(dict.fromkeys(means["task"])), list(dict.fromkeys(means["metric"]))
    none = judged.degenerate_tasks(run)

    def text(r: Row) -> str:
        nothing = (r.method, r.task) in none and r.metric in numbers.DECIDED
        return f"{show(r.value, r.value_sd)}{f' {NOTHING}' if nothing else ''}"

    texts = means.assign(text=[text(r) for r in rows(means)])
    wide = texts.pivot(index=["task", "method"], columns="metric", values="text").reindex(columns=names)
    wide = wide.reindex(pd.MultiIndex.from_product([tasks, run.methods], names=["task", "method"]))
    heads = [f"{numbers.LABELS.get(m, m)} {'↑' if m in numbers.HIGHER_IS_BETTER else '↓'}" for m in names]
    return sheet("Utility by task", ["task", "method", *heads], wide.reset_index(), MARKS if none else "")


def pays_sheets(run: RunFolder) -> Iterator[Sheet]:
    """What changed for each group against the reference, one table for each threshold and attribute."""
    for end in judged.thresholds(run):
        every, none, down = judged.who_pays(run, end), judged.degenerate_tasks(run, end), judged.levelled_down(run, end)
        for attribute, frame in every.groupby("attribute", sort=False):
            lines = []
            for row in rows(in_order(frame, "task", "group")):
                nothing, levels = (row.method, row.task) in none, row.task in down.get((row.method, str(attribute)), ())
                marks = f" {NOTHING if nothing else DOWN}" if nothing or levels else ""
                people = f"{row.n:,.0f}{' steps' * (row.unit == 'steps')} ({row.positives:,.0f} yes)"
                changed = (_change(row, name, marks) for name in _CHANGES)
                lines.append((row.task, row.group, people, f"{row.method}{marks}", *changed))
            heads = ["task", "group", " or ".join(sorted(set(frame["unit"]))), "method", *_CHANGES.values()]
            yield sheet(
                f"Who pays, by {attribute}{end}",
                heads,
                pd.DataFrame(lines),
                f"{notes.PAYS.format(run.reference)} {MARKS}.",
            )


_CHANGES = {
    "selection": "gets a yes",
    "tpr": "rightful yes (TPR)",
    "fpr": "wrong yes (FPR)",
    "error": "decided wrongly",
}


def _change(row: Row, name: str, marks: str) -> Cell:
    """Write a change with its noise; what levels down, or is one answer for all, is not shaded as good."""
    change, noise = getattr(row, f"d_{name}"), judged.SURE * getattr(row, f"se_{name}")
    if change != change:
        return Cell("–")
    sure = abs(change) > noise and name != "selection"
    good = (change > 0) == (name == "tpr")
    said = ("gains ▲" * (NOTHING not in marks) if good else "loses ▼") if sure else ""
    both = f"{getattr(row, f'{name}_before'):.3f} → {getattr(row, name):.3f}"
    tone = ("good" * (not marks) if good else "bad") if sure else ""
    return Cell(f"{change:+.3f} ± {noise:.3f} {said}".strip(), both, tone=tone)


def gain_sheet(run: RunFolder, found: pd.DataFrame | None = None) -> Sheet | None:
    """Knowledge and discrimination gain by task; None without a single-task method."""
    found = numbers.gains(run) if found is None else found
    if found.empty:
        return None
    title = f"Against {numbers.single_task_methods(run)[0]} (each task alone)"
    heads = ["method", "task", *numbers.GAINS.values()]
    return sheet(title, heads, found.drop(columns="seeds"), notes.gain_verdict(found), sign="+")


def audit_sheet(run: RunFolder) -> Sheet | None:
    """Bias and VR under each tolerance, and the place relative to the shrinkage envelope."""
    keys, verdict = ["delta_name", "method"], numbers.shrinkage_verdict(run)
    below = [f"{'yes' if r.below else 'no'} ({r.seeds_below} of {r.seeds} seeds)" for r in rows(verdict)]
    means = numbers.with_sd(run.frame("audit"), keys, ["delta", "bias", "violation_rate"]).drop(columns="delta_sd")
    means.insert(1, "delta", means.pop("delta"))
    frame = means.merge(verdict.assign(words=below)[[*keys, "curve_bias", "words"]], "left", keys)
    heads = ["tolerance", "δ", "method", "Bias ↓", "VR ↓", f"{run.reference} shrunk, no more error", "below it"]
    return sheet("Bias and violation rate", heads, in_order(frame, "delta_name")) if len(frame) else None


def pair_sheet(run: RunFolder) -> Sheet | None:
    """Bias and VR of every task pair under the first tolerance."""
    frame = run.frame("pairs")
    if frame.empty:
        return None
    first = frame["delta_name"].iloc[0]
    grouped = frame[frame["delta_name"] == first].groupby(["task_a", "task_b", "method"], sort=False)
    means = in_order(grouped[["bias", "violation_rate"]].mean().reset_index(), "task_a", "task_b")
    return sheet(f"By task pair, tolerance {first}", ["task", "task", "method", "Bias ↓", "VR ↓"], means)


def people_sentence(run: RunFolder) -> str:
    """Say by what people are alike, in one sentence; "" where there was no audit of people."""
    each = [item.people(run.split) for item in run.runs]
    said = list(dict.fromkeys(str(found["reference"]) for found in each if found.get("reference")))
    if len(said) > 1:
        return "The runs do not say alike of the same people, so they cannot be compared in it: " + " ".join(said)
    return said[0] if said else ""


def consistency_sheet(run: RunFolder, tasks: bool = False) -> Sheet | None:
    """Whether like people are treated alike, mean over tasks or by task; small: the mean of the intervals. None without an audit."""
    frame = run.frame("consistency")
    frame = frame[(frame["task"] != "macro") == tasks]
    if frame.empty:
        return None
    columns = {"inconsistency": "inconsistency ↓"}
    if not tasks:
        named = frame["metric"][frame["metric"].str.startswith("inconsistency[")]
        columns |= {name: name.removeprefix("inconsistency[").rstrip("]") for name in named}
    columns |= {"calibrated": "calibrated ↓", "violation_0.1": "over .1 ↓", "violation_0.3": "over .3 ↓"}
    columns |= {"decisions": "decisions ↓", "flip": "flip gap ↓"} | ({} if tasks else {"cross_task": "profile ↓"})
    keys = ["task", "method", "metric"]
    means = rows(numbers.with_sd(frame, keys, ["value", "low", "high"]))
    found = {
        (r.task, r.method, r.metric): Cell(
            show(r.value, r.value_sd), f"[{r.low:.3f}, {r.high:.3f}]" if r.low == r.low else ""
        )
        for r in means
    }

    names = [task for task in dict.fromkeys(frame["task"]) if tasks or task == "macro"]
    body = [
        {"task": task, "method": method} | {name: found.get((task, method, name), Cell("–")) for name in columns}
        for task in names
        for method in run.methods
    ]
    made = pd.DataFrame(body)
    made = made if tasks else made.drop(columns="task")
    title = "By task" if tasks else "Inconsistency, mean over tasks"
    marked = [
        f"{task} of {i.method}, seed {i.seed} ({why})" for i in run.runs for task, why in _undefined(i, run.split)
    ]
    note = f"Undefined, and left out of means: {'; '.join(marked)}." if marked else ""
    note = note if tasks else f"{PEOPLE} {note}".strip()
    return sheet(title, [*(["task", "method"] if tasks else ["method"]), *columns.values()], made, note)


def _undefined(item: SeedRun, split: str) -> list[tuple[str, str]]:
    found = item.people(split).get("undefined")
    return [(str(task), str(why)) for task, why in found.items()] if isinstance(found, dict) else []


def worst_sheet(run: RunFolder) -> Sheet | None:
    """The ten pairs of near people that are furthest apart in rank, for the first seed of each method; rows are the table's."""
    frames = []
    for method in run.methods:
        found = pd.DataFrame(run.of(method)[0].people(run.split).get("worst_pairs") or [])
        frames.append(found.assign(method=method))
    frame = pd.concat(frames, ignore_index=True)
    names = {"source_row": "row", "source_other": "other row", "distance": "distance", "inconsistency": "apart"}
    if not set(names) <= set(frame):
        return None
    ranks = [c for c in frame if str(c).endswith((", row", ", other"))]
    frame = (
        frame[["method", *names, *ranks]]
        .dropna(subset=["source_row", "source_other"])
        .astype({"source_row": int, "source_other": int})
    )
    heads = ["method", *names.values(), *(f"rank {str(c).replace(', other', ', other row')}" for c in ranks)]
    return sheet("Worst-treated pairs", heads, frame, digits=3)


def group_sheet(run: RunFolder, between: bool = False) -> Sheet | None:
    """Every metric of every group, or every difference and ratio ``between`` groups, with the mean of its intervals."""
    means = numbers.group_means(run).rename(columns={"sd": "value_sd"})
    means = means[means["group"].isin(numbers.BETWEEN_GROUPS) == between]
    means = in_order(means, "task", "attribute", "metric", "group")
    means["metric"] = means["metric"].str.replace("_", " ")
    none = judged.degenerate_tasks(run)
    means["flag"] = ["; ".join(filter(None, (r.flag, none.get((r.method, r.task))))) for r in rows(means)]
    means["n"] = [f"{n:.0f}" if n == n else "–" for n in means["n"]]
    intervals = [f"[{r.low:.3f}, {r.high:.3f}]" if r.low + r.high == r.low + r.high else "–" for r in rows(means)]
    means.insert(6, "interval", intervals)
    title, head = ("Differences and ratios between groups", "statistic") if between else ("Groups", "group")
    heads = ["task", "attribute", "metric", head, "method", "value", "interval", "n", "flag"]
    return sheet(title, heads, means.drop(columns=["low", "high"]), digits=3) if len(means) else None


def standing_sheet(overview: pd.DataFrame) -> Sheet:
    """Return mean rank and Delta_m of every method, by utility alone and with the differences between groups."""
    texts = {name: [f"{rank:.2f}" for rank in overview[name]] for name in ("mean_rank", "fair_rank")}
    texts |= {name: [f"{loss:+.2f} %" for loss in overview[name]] for name in ("delta_m", "fair_delta_m")}
    heads = ["method", "mean rank ↓", "Δm ↓", "mean rank, fairness too ↓", "Δm, fairness too ↓"]
    columns = ["method", "mean_rank", "delta_m", "fair_rank", "fair_delta_m"]
    if "worst" in overview:
        columns, heads = [*columns, "worst", "macro"], [*heads, "worst ↑", "macro ↑"]
    return sheet("Ranks and Δm", heads, overview.assign(**texts)[columns], notes.STANDING)


def published_sheet(run: RunFolder, published: pd.DataFrame | None = None) -> Sheet | None:
    """Return a source's numbers beside ours; None where the recipe holds none."""
    if published is None:
        if not run.recipe.get("published"):
            return None
        published = numbers.beside_published(run, numbers.summary(run, further=True), numbers.standing(run))
    heads = ["method", "measure", "published", "ours", "ours − published"]
    frame = published.assign(gap=[f"{r.ours - r.published:+.4f}" for r in rows(published)])
    return sheet("Beside published numbers", heads, frame, notes.publication(run)) if len(frame) else None


def drift_sheet(drift: pd.DataFrame) -> Sheet | None:
    """Return ranks under raw and fixed thresholds, drift budgets and robustness."""
    heads = ["tolerance", "method", "raw Bias", "rank", "fixed Bias", "rank", "own threshold", "drift budget", "robust"]
    columns = ["delta_name", "method", "raw_bias", "rank_raw", "fixed_bias", "rank_fixed", "mean_threshold", "budget"]
    return sheet("Threshold drift", heads, drift[[*columns, "robust"]], notes.DRIFT) if len(drift) else None


def in_order(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Rows sorted by columns, each in its order of appearance, so that equal things stand together."""
    ranks = pd.DataFrame({column: pd.factorize(frame[column])[0] for column in columns}, index=frame.index)
    return frame.loc[ranks.sort_values(list(columns), kind="stable").index]


def data_sheets(run: RunFolder) -> Iterator[Sheet]:
    """Tasks and groups of the data card with sizes and base rates."""
    tasks: Mapping[str, Json] = run.data_card.get("tasks") or {}
    if tasks:
        heads = ["task", "kind", "definition", "labelled", "missing", "base rate"]
        body = [
            (name, t["kind"], t["definition"], f"{t['labelled']:,}", f"{t['missing']:,}", base_rate(t))
            for name, t in tasks.items()
        ]
        yield sheet("Tasks", heads, pd.DataFrame(body))
    for attribute, entry in (run.data_card.get("groups") or {}).items():
        lines = []
        for name, group in entry["groups"].items():
            rates = [base_rate(task["per_group"].get(attribute, {}).get(name, {})) for task in tasks.values()]
            lines.append([name, f"{group['rows']:,}", f"{group['share']:.1%}", f"{group['split']['test']:,}", *rates])
        yield sheet(f"Groups of {attribute}", ["group", "rows", "share", "test rows", *tasks], pd.DataFrame(lines))


def base_rate(entry: Json) -> str:
    """Base rate, mean or class shares of a task in the data card.

    >>> base_rate({"rate": 0.239}), base_rate({"mean": 40.4, "std": 12.4})
    ('23.9%', '40.4 ± 12.4')
    """
    if entry.get("rate") is not None:
        return f"{entry['rate']:.1%}"
    if entry.get("mean") is not None:
        return f"{entry['mean']:.4g} ± {entry.get('std') or 0:.3g}"
    classes = entry.get("classes") or {}
    total = entry.get("n") or sum(classes.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in classes.items()) if classes and total else "–"


@damage_named
def summary_table(run: RunFolder, width: int | None = None) -> Table | Group:
    """Build the table that ends a run on the console.

    One row a method. Where that needs more than ``width`` characters, one row a column instead; where that does not fit
    either, several tables below each other, so that a narrow terminal shows whole numbers. Best mean with a star,
    difference to the reference below it, dim.
    """
    cells = numbers.summary(run)
    methods, columns = run.methods, list(dict.fromkeys(cells["column"]))
    found = {(row.method, row.column): starred(row) for row in rows(cells)}
    for row in rows(cells[cells["difference"].notna()]):
        found[row.method, row.column].append(f"\n{row.difference:+.3f}", style="not bold dim")

    def width_of(heads: Sequence[str], names: Sequence[str]) -> int:
        return 4 + max(map(len, heads)) + sum(max(16, len(name)) + 3 for name in names)

    def table(heads: Sequence[str], names: Sequence[str]) -> Table:
        made = titled(f"{run.name}: {run.split}", run)
        made.add_column("method" if heads == methods else "", no_wrap=True)
        for name in names:
            made.add_column(Text(name), justify="right", no_wrap=True)
        for head in heads:
            made.add_row(Text(head), *(found.get((head, n)) or found.get((n, head)) or Text("–") for n in names))
        caption = f"* best mean; small: difference to {run.reference}; {MARKS}"
        made.caption = Text(caption, style="dim") if len(methods) > 1 else None
        return made

    if width is None or width_of(methods, columns) <= width:
        return table(methods, columns)
    if width_of(columns, methods) <= width:
        return table(columns, methods)
    per_part = max(1, (width - 4 - max(map(len, methods))) // (max(16, *map(len, columns)) + 3))
    parts = [table(methods, columns[i : i + per_part]) for i in range(0, len(columns), per_part)]
    for before, after in pairwise(parts):  # one title above all, one caption below
        before.caption = after.title = None
    return Group(*parts)


def titled(title: str, run: RunFolder) -> Table:
    """Return an empty table for the console."""
    seeds = f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else "1 seed"
    return Table(title=f"{title}, mean ± sd over {seeds}", title_justify="left")


def starred(row: Row) -> Text:
    """Write a cell of the summary; the best mean is bold and has a star, what says nothing or levels down a mark."""
    text = " ".join(filter(None, (show(row.mean, row.sd) + "*" * bool(row.best), "".join(remarks(row)))))
    return Text(text, style="bold" if row.best else "")
