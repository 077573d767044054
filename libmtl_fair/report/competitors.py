"""Is a method beaten by what costs no training? Every method beside simple competitors at equal disparity (METHODS.md, 5.1; ours)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pandas as pd
import torch

from libmtl_fair import metrics
from libmtl_fair.arrays import as_floats
from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.files import Json, file_digest, read_json, write_json
from libmtl_fair.metrics.consistency import scores_of
from libmtl_fair.metrics.near_pairs import NearPairs
from libmtl_fair.metrics.post_models import (
    STRENGTHS,
    Along,
    Blend,
    Point,
    PostModel,
    binary_tasks,
    fit_offsets,
    fit_thresholds,
    pick,
    worst_gap,
)
from libmtl_fair.metrics.ranks import RankedTask, mean_known
from libmtl_fair.metrics.scores import thresholds_in_use
from libmtl_fair.metrics.verdicts import FEWEST, MOST
from libmtl_fair.predictions import Predictions
from libmtl_fair.report import judged
from libmtl_fair.report.reaudit import load_predictions
from libmtl_fair.report.run_folder import Row, RunFolder, number, rows
from libmtl_fair.report.tables import Cell, Sheet, sheet

TITLE = "Beside simple competitors"
EQUAL_DISPARITY, EQUAL_UTILITY, AS_IT_IS = "equal disparity", "equal utility", "as it is"
UTILITIES = {"accuracy": "accuracy", "macro AUC": "auc"}
_EO = "EO "
INCONSISTENCY = "inconsistency"
_EQUAL = {"utility": 1e-3, "disparity": 1e-2}
"""Means that differ by at most this count as equal, unless an interval says otherwise (ours)."""
_DEGENERATE = "degenerate"
_FORMAT = 2
Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Family:
    """A competitor along a path: its name, the methods that it is made of, the measures it is for, and how it is fitted."""

    name: str
    of: tuple[str, ...]
    measures: tuple[str, ...]
    fit: Callable[[Predictions], PostModel]


def families(run: RunFolder) -> list[Family]:
    """Return the competitors that need no training: offsets and thresholds for each attribute, a blend with an unaware method."""
    threshold: float | str = (run.recipe.get("metrics") or {}).get("threshold") or 0.5
    found, reference = [], run.reference
    attributes = _attributes(run)
    for name in attributes:
        for what, fit in (("offsets", fit_offsets), ("thresholds", fit_thresholds)):
            how = partial(fit, sensitive=name, threshold=threshold)
            found.append(Family(f"{what} ({name})", (reference,), (f"{_EO}{name}",), how))
    every = (*(f"{_EO}{name}" for name in attributes), INCONSISTENCY)
    found += [
        Family(f"blend with {other}", (reference, other), every, lambda _: Blend()) for other in _unaware(run)[:1]
    ]
    return found


def _attributes(run: RunFolder) -> list[str]:
    names = dict.fromkeys(str(row.get("attribute")) for row in run.runs[0].entries("groups", run.split))
    return [name for name in names if " & " not in name]


def _settings(run: RunFolder, method: str) -> Json:
    return run.of(method)[0].metrics.get("settings") or {}


def _unaware(run: RunFolder) -> list[str]:
    """Return the methods that are the reference without sensitive inputs."""
    weighting = run.of(run.reference)[0].metrics.get("weighting")
    same = (m for m in run.methods if run.of(m)[0].metrics.get("weighting") == weighting)
    return [method for method in same if _settings(run, method).get("unaware") and method != run.reference]


def _made(run: RunFolder) -> list[str]:
    """Return the methods of a run that are competitors themselves, as they stand."""
    posts = [method for method in run.methods if run.of(method)[0].metrics.get("post")]
    return [*posts, *(method for method in _unaware(run) if method not in posts)]


def _measured(run: RunFolder, split: str) -> dict[tuple[str, int], Values]:
    """Return utilities and disparities of every method and seed of a split; what is undefined is absent."""
    part = dataclasses.replace(run, on=split)
    found: dict[tuple[str, int], Values] = {}
    frame = part.frame("utility")
    names = {metric: name for name, metric in UTILITIES.items()}
    for row in rows(frame[(frame["task"] == "macro") & frame["metric"].isin(names) & frame["value"].notna()]):
        found.setdefault((row.method, row.seed), {})[names[row.metric]] = row.value
    people = part.frame("consistency")
    for row in rows(
        people[(people["task"] == "macro") & (people["metric"] == INCONSISTENCY) & people["value"].notna()]
    ):
        found.setdefault((row.method, row.seed), {})[INCONSISTENCY] = row.value
    for made in (d for d in judged.decisions(part) if not d.label):
        for seed in made.by_seed:
            gap, own = made.gap("equalized_odds", seed).value, found.setdefault((made.method, seed), {})
            if gap == gap:
                own[f"{_EO}{made.attribute}"] = max(gap, own.get(f"{_EO}{made.attribute}", 0.0))
            n, (_, fp, _, tp) = made.by_seed[seed].to_numpy().sum(), made.by_seed[seed].to_numpy().sum(0)
            void = n > 0 and not FEWEST <= (fp + tp) / n <= MOST
            own[_DEGENERATE] = max(float(void), own.get(_DEGENERATE, 0.0))
    return found


class Bench:
    """The competitors of one seed, from the saved predictions of the methods that they are made of; kept in the run's folder."""

    def __init__(self, run: RunFolder, seed: int) -> None:
        section = run.recipe.get("metrics") or {}
        self.items = {item.method: item for item in run.runs if item.seed == seed}
        self.threshold: float | str = section.get("threshold") or 0.5
        self.smallest, self.split = int(section.get("min_group_size") or 30), run.split
        self.attributes = _attributes(run)
        self.path = self.items[run.reference].folder.parent.parent / "competitors" / f"seed{seed}.json"
        self.kept = self._read()
        self._held: dict[tuple[str, str], Predictions] = {}
        self._along: dict[tuple[str, str], Along] = {}
        self._models: dict[str, PostModel] = {}
        self._found: dict[str, NearPairs] = {}
        self._fresh: set[str] = set()
        name = f"_seed{seed}" if (run.recipe.get("data") or {}).get("resplit") else ""
        self._near = {part: self.path.parents[1] / f"near_pairs_{part}{name}.npz" for part in ("val", self.split)}

    def values(self, family: Family, strength: float, part: str) -> Values:
        """Return utilities and disparities of a competitor on a part; undefined ones are absent."""
        values, key = self._of(family)["values"], f"{strength:g} {part}"
        if key not in values:
            values[key] = self._computed(family, strength, part)
        return {name: number(value) for name, value in values[key].items()}

    def picked(self, family: Family, measure: str, method: Values) -> dict[str, float]:
        """Return how a competitor was put beside a method -> its strength, both by validation.

        At equal disparity: the least strength with at most the method's disparity, else 1. At equal utility: that of the lowest
        disparity among those with at least the method's accuracy and AUC, else the one of the highest accuracy and AUC.
        """
        along = {s: self.values(family, s, "val") for s in STRENGTHS}
        points = [Point(s, found.get(measure, math.nan)) for s, found in along.items()]
        as_good = [p for p in points if all(along[p.strength].get(u, 1.0) >= method.get(u, 0.0) for u in UTILITIES)]
        if not as_good:
            as_good = [max(points, key=lambda p: sum(along[p.strength].get(u, 0.0) for u in UTILITIES))]
        return {EQUAL_DISPARITY: pick(points, method[measure]).strength, EQUAL_UTILITY: pick(as_good).strength}

    def save(self) -> None:
        """Keep what was computed; a folder that cannot be written is left as it is."""
        if self.kept != self._read():
            with suppress(OSError, CheckpointError):
                write_json(self.path, self.kept)

    def _read(self) -> dict[str, Json]:
        with suppress(CheckpointError, AttributeError):
            held = read_json(self.path).items() if self.path.exists() else ()
            return {name: entry for name, entry in held if isinstance(entry.get("values"), dict)}
        return {}

    def _of(self, family: Family) -> Json:
        """Return what is kept of a competitor; what was made of other predictions or settings is forgotten."""
        if family.name not in self._fresh:
            parts = ("val", "test")
            files = [self.items[m].folder / f"predictions_{part}.parquet" for m in family.of for part in parts]
            files += self._near.values() if INCONSISTENCY in family.measures else ()
            digest = hashlib.sha256(f"{_FORMAT} {self.threshold} {self.smallest} {self.attributes}".encode())
            for file in files:
                digest.update(file_digest(file).encode() if file.exists() else b"")
            if self.kept.get(family.name, {}).get("digest") != digest.hexdigest():
                self.kept[family.name] = {"digest": digest.hexdigest(), "values": {}}
            self._fresh.add(family.name)
        return self.kept[family.name]

    def _computed(self, family: Family, strength: float, part: str) -> Values:
        made, decides = self._path(family, part)(strength), self.threshold
        cut = thresholds_in_use(self._path(family, "val")(strength) if decides == "base_rate" else made, decides)
        gaps = {a: worst_gap(made, a, thresholds=cut, min_group_size=self.smallest) for a in self.attributes}
        found = {f"{_EO}{attribute}": gap for attribute, gap in gaps.items()}
        if INCONSISTENCY in family.measures and self._near[part].exists():
            found[INCONSISTENCY] = inconsistency(made, self._path(family, "val")(strength), self._pairs(part))
        macro = metrics.utility(made, cut)["macro"]
        found |= {name: macro[metric] for name, metric in UTILITIES.items() if metric in macro}
        scores = {name: made.task(name).probabilities(made.outputs[name]) for name in binary_tasks(made)}
        shares = [float((p > torch.tensor(cut[name])).double().mean()) for name, p in scores.items()]
        found[_DEGENERATE] = float(any(not FEWEST <= share <= MOST for share in shares))
        return {name: value for name, value in found.items() if value == value}

    def _path(self, family: Family, part: str) -> Along:
        if (family.name, part) not in self._along:
            if family.name not in self._models:
                self._models[family.name] = family.fit(self._predictions(family.of[0], "val"))
            held = (self._predictions(method, part) for method in family.of)
            self._along[family.name, part] = self._models[family.name].along(*held)
        return self._along[family.name, part]

    def _pairs(self, part: str) -> NearPairs:
        if part not in self._found:
            self._found[part] = NearPairs.load(self._near[part])
        return self._found[part]

    def _predictions(self, method: str, part: str) -> Predictions:
        if (method, part) not in self._held:
            self._held[method, part] = load_predictions(self.items[method], part)
        return self._held[method, part]


def inconsistency(predictions: Predictions, val: Predictions, pairs: NearPairs) -> float:
    """Return the inconsistency of a model's predictions, mean over tasks, as :class:`ConsistencyAudit` has it, and no more."""
    scores, base = (scores_of(p) for p in (predictions, val))
    labels = {t.name: val.labels[t.name].numpy() for t in predictions.tasks if t.kind == "multiclass"}
    tasks = [RankedTask(n, as_floats(s), as_floats(base[n]), labels.get(n), None, None) for n, s in scores.items()]
    return mean_known([float(task.gaps(pairs).mean()) for task in tasks if not task.undefined])


_KEYS = ["method", "competitor", "measure", "at", "utility"]
_ENDS = [f"{name}{end}" for name in ("d_utility", "d_disparity") for end in ("", "_low", "_high")]


def dominated(run: RunFolder) -> pd.DataFrame:
    """Compare every trained method with each simple competitor, paired over the seeds that both have.

    A competitor with a strength is put beside a method twice, by validation data: at equal disparity and at equal utility (see
    :meth:`Bench.picked`); a post-processing or unaware method of the run stands as it is. Differences are method minus
    competitor on the reported split, with 95 % intervals (NaN with one seed).

    Returns
    -------
    DataFrame
        One row a method, competitor, measure (``EO <attribute>``: the worst binary task's; ``inconsistency``: blends
        and the run's own competitors), ``at`` and utility (accuracy, and macro AUC where both have scores): these,
        strength, seeds, d_utility, d_utility_low, d_utility_high, d_disparity, d_disparity_low, d_disparity_high,
        verdict, dominated. ``verdict``: "dominated" where the competitor has at least the utility and at most the
        disparity, one of them clearly (the interval excludes 0), and no utility or disparity clearly worse; "ahead"
        where the method is clearly better in one and clearly worse in none; "trades" where it is both; else "not
        distinguishable". A competitor that selects nobody or everybody dominates nothing.
    """
    return run.once("dominated", lambda: _dominated(run))


def _dominated(run: RunFolder) -> pd.DataFrame:
    found = pd.DataFrame(_pairs(run), columns=[*_KEYS, "seed", "strength", "void", "ours", "theirs", "gap", "other"])
    out: list[Json] = []
    for _, part in found.groupby(_KEYS[:4], sort=False):
        each = [_difference(one) for _, one in part.groupby("utility", sort=False)]
        worse = any(row["d_utility_high"] < 0 or row["d_disparity_low"] > 0 for row in each)
        better = any(row["d_utility_low"] > 0 or row["d_disparity_high"] < 0 for row in each)
        for row in each:
            level = row["d_utility"] <= _EQUAL["utility"] and row["d_disparity"] >= -_EQUAL["disparity"]
            clear = row["d_utility_high"] < 0 or row["d_disparity_low"] > 0
            row["dominated"] = bool(level and clear and not better and not part["void"].any())
            other = ("trades" if worse else "ahead") if better else "not distinguishable"
            row["verdict"] = "dominated" if row["dominated"] else other
        out += each
    return pd.DataFrame(out, columns=[*_KEYS, "strength", "seeds", *_ENDS, "verdict", "dominated"])


def _difference(part: pd.DataFrame) -> Json:
    row: Json = {name: str(part[name].iloc[0]) for name in _KEYS} | {"strength": float(part["strength"].mean())}
    for name, (a, b) in {"d_utility": ("ours", "theirs"), "d_disparity": ("gap", "other")}.items():
        found = metrics.paired_difference(part[a], part[b])
        row |= {
            name: found["mean"],
            f"{name}_low": found["low"],
            f"{name}_high": found["high"],
            "seeds": int(found["n"]),
        }
    return row


def _pairs(run: RunFolder) -> Iterator[tuple[object, ...]]:
    """Yield what :func:`dominated` compares, of each seed: utilities and disparities of a method and of a competitor."""
    made, every = _made(run), families(run)
    numbers = {split: _measured(run, split) for split in {run.split, "val"}}
    asked = [method for method in run.methods if method != run.reference and method not in made]
    for seed in run.seeds if asked else ():
        bench = Bench(run, seed)
        for method in (name for name in asked if name in bench.items):
            own, val = (numbers[split].get((method, seed), {}) for split in (run.split, "val"))
            for measure in (name for name in own if name.startswith((_EO, INCONSISTENCY))):
                present = (name for name in made if name in bench.items)
                others = [(name, AS_IT_IS, math.nan, numbers[run.split].get((name, seed), {})) for name in present]
                for family in every if measure in val else ():
                    if measure in family.measures and set(family.of) <= bench.items.keys():
                        with suppress(FairMTLError):
                            for at, s in bench.picked(family, measure, val).items():
                                others.append((family.name, at, s, bench.values(family, s, run.split)))
                for name, at, strength, theirs in others:
                    for utility in UTILITIES if measure in theirs else ():
                        if utility in own and utility in theirs:
                            void = theirs.get(_DEGENERATE, 0.0) > 0
                            pair = own[utility], theirs[utility], own[measure], theirs[measure]
                            yield method, name, measure, at, utility, seed, strength, void, *pair
        bench.save()


def verdicts(run: RunFolder) -> list[str]:
    """Return one sentence a method and disparity: what dominates it, or that nothing simple is shown to."""
    found = dominated(run)
    if found.empty:
        return [why] if (why := lacking(run)) else []
    if found["seeds"].max() < 2:
        return ["With one seed nothing can be said of simple competitors: their differences have no interval."]
    return [
        _sentence(str(m), str(measure), part) for (m, measure), part in found.groupby(["method", "measure"], sort=False)
    ]


def _sentence(method: str, measure: str, part: pd.DataFrame) -> str:
    what = f"equalised odds by {measure.removeprefix(_EO)}" if measure.startswith(_EO) else measure
    beaten = part[part["dominated"]]
    if len(beaten):
        told = [_told(row) for row in rows(beaten.drop_duplicates("competitor"))]
        return f"{method} is dominated in {what}, by {'; and by '.join(told)}."
    by = part.groupby("competitor", sort=False)["verdict"].agg(set)
    ahead, level = ([str(n) for n, seen in by.items() if seen == {v}] for v in ("ahead", "not distinguishable"))
    parts = [f"it is ahead of {', '.join(ahead)}"] if ahead else []
    parts += [f"not distinguishable from {', '.join(level)}"] if level else []
    parts += ["against the others it trades one for the other"] if len(ahead) + len(level) < len(by) else []
    return f"{method}: no simple competitor is shown to dominate it in {what}; {', '.join(parts)}."


def _told(row: Row) -> str:
    def number_of(name: str, digits: int) -> str:
        ends = (-getattr(row, f"{name}{end}") for end in ("", "_high", "_low"))
        return "{} [{}, {}]".format(*(f"{value:+.{digits}f}" for value in ends))

    what = "gap" if row.measure.startswith(_EO) else row.measure
    free = "" if row.at == AS_IT_IS else ", which needs no training of its own"
    return f"{row.competitor}{free}: {row.utility} {number_of('d_utility', 4)}, {what} {number_of('d_disparity', 3)} against it"


def lacking(run: RunFolder) -> str:
    """Say why a run has no competitors; "" where it should have."""
    items = run.of(run.reference)
    if not _attributes(run) or all(method == run.reference for method in run.methods):
        return ""
    gone = [
        item
        for item in items
        for part in ("val", run.split)
        if not (item.folder / f"predictions_{part}.parquet").exists()
    ]
    if gone:
        return f"Simple competitors were not made: {run.reference} has no saved predictions (output.predictions)."
    known = (name for found in _measured(run, run.split).values() for name in found)
    binary = any(name.startswith(_EO) for name in known)
    return "" if binary else "Simple competitors were not made: they decide binary tasks of enough people."


def competitor_sheet(run: RunFolder) -> Sheet | None:
    """Return the table of :func:`dominated` with its sentences below it; None where there is nothing to compare."""
    found = dominated(run)
    said = verdicts(run)
    if not said:
        return None
    shown = [
        {name: getattr(r, name) for name in _KEYS}
        | {"strength": f"{r.strength:.2f}" if r.strength == r.strength else "–"}
        | {"d_utility": _cell(r.d_utility, r.d_utility_low, r.d_utility_high, 4)}
        | {"d_disparity": _cell(r.d_disparity, r.d_disparity_low, r.d_disparity_high, 3)}
        | {"verdict": r.verdict}
        for r in rows(found)
    ]
    heads = ("method", "competitor", "disparity", "at", "utility", "strength", "Δ utility", "Δ disparity", "verdict")
    about = "Method minus competitor, whose strength validation data chose; small: 95 % intervals over seeds."
    return sheet(TITLE, heads, pd.DataFrame(shown, columns=None if shown else heads), " ".join([about, *said]))


def _cell(value: float, low: float, high: float, digits: int) -> Cell:
    small = f"[{low:+.{digits}f}, {high:+.{digits}f}]" if low == low else ""
    return Cell(f"{value:+.{digits}f}", small)
