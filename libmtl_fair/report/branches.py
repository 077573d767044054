"""Who shares with whom, in the report: branch trees and their events, conflicts between gradients, affinities and groups of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.files import Json
from libmtl_fair.methods.fairbranch.tree import BranchTree
from libmtl_fair.recipe.networks import GROUPS, task_groups
from libmtl_fair.report.notes import EVENTS
from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.tables import Sheet, sheet
from libmtl_fair.report.theme import Plot, canvas, conflict_map, slug, task_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Branching:
    """The branches of one method and seed: the tree after the last epoch, that of the chosen checkpoint, the last's events."""

    method: str
    seed: int
    last: BranchTree
    chosen: BranchTree
    events: tuple[Json, ...]


def branchings(run: RunFolder, *methods: str) -> list[Branching]:
    """Return the branches of every seed of some methods (none: all); CheckpointError where a ``structure.json`` is damaged."""
    found = []
    for item in (item for method in methods or run.methods for item in run.of(method)):
        content = item.structure()
        if content is None:
            continue
        try:
            last, chosen = (BranchTree.from_dict(content[part]["tree"]) for part in ("last", "chosen"))
            events = tuple(dict(event) for event in content["last"]["events"])
        except (FairMTLError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{item.folder / 'structure.json'} is damaged ({error}); run again to make it anew"
            ) from error
        found.append(Branching(item.method, item.seed, last, chosen, events))
    return found


def tree_texts(run: RunFolder) -> list[tuple[str, str]]:
    """Return (whose tree, drawn as text) for every method that branches; seeds with the same tree stand together."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for item in branchings(run):
        other = f"\n\nchosen checkpoint, which the numbers are of:\n{item.chosen}" if item.chosen != item.last else ""
        seeds.setdefault((item.method, f"{item.last}{other}"), []).append(str(item.seed))
    return [
        (f"{m}, seed{'s' if len(which) > 1 else ''} {', '.join(which)}", text) for (m, text), which in seeds.items()
    ]


def event_sheet(run: RunFolder) -> Sheet | None:
    """Every branch event: when, which block, the groups of tasks after it, and the similarities that decided."""
    body = [[item.method, item.seed, *_event(event)] for item in branchings(run) for event in item.events]
    heads = ["method", "seed", "epoch", "block", "copies for", "most alike"]
    return sheet("Branch events", heads, pd.DataFrame(body), EVENTS) if body else None


def _event(event: Json) -> list[object]:
    compared, epoch, text = event.get("compared") or [], event.get("epoch"), "–"
    similar = np.array(event.get("similarity") or [[]], dtype=float)
    if len(similar) > 1 and similar.shape == (len(compared), len(compared)):
        a, b = np.unravel_index(int(np.argmax(similar - 2 * np.eye(len(similar)))), similar.shape)
        text = f"{_names(compared[a])} and {_names(compared[b])}: {similar[a, b]:.2f}"
    groups = "; ".join(map(_names, event.get("groups") or []))
    return ["–" if epoch is None else epoch, event.get("block", "–"), groups, text]


def _names(group: Iterable[object]) -> str:
    return " + ".join(map(str, group))


def groupings(run: RunFolder, *methods: str) -> list[tuple[str, int, Json]]:
    """Return (method, seed, what ``task_groups.json`` holds) of every method by task groups (none given: of all)."""
    found = [item for method in methods or run.methods for item in run.of(method)]
    return [(i.method, i.seed, task_groups(i.folder)) for i in found if (i.folder / GROUPS).exists()]


def grouping_sheet(run: RunFolder) -> Sheet | None:
    """Every network of a method by task groups: what it is trained on, whom it answers for, and the affinity that these get there."""
    body: list[list[object]] = []
    for method, seed, held in groupings(run):
        z = _affinity(held)
        for group in held["groups"]:
            others = [z.loc[[t for t in group["tasks"] if t != task], task].mean() for task in group["serves"]]
            body.append([method, seed, _names(group["tasks"]), _names(group["serves"]), float(np.mean(others))])
    heads = ["method", "seed", "trained on", "answers for", "mean affinity"]
    return sheet("Task groups", heads, pd.DataFrame(body), sign="+") if body else None


def _affinity(held: Json) -> pd.DataFrame:
    return pd.DataFrame(held["affinity"], held["tasks"], held["tasks"], dtype=float)


def affinity_map(affinity: pd.DataFrame) -> Figure:
    """Heat map of affinities [T, T], from the row's task to the column's: blue helps, red hinders."""
    names, values = [str(name) for name in affinity.columns], affinity.to_numpy(dtype=float)
    wide = 2.4 + 0.42 * len(names)
    figure, (axes,) = canvas(wide + 0.6, wide)
    others = np.abs(values[np.isfinite(values) & ~np.eye(len(names), dtype=bool)])
    top = float(others.max(initial=0.0)) or 1.0
    mesh = task_matrix(axes, values, names, "RdBu", -top, top)
    axes.set(xlabel="loss of", ylabel="after a step for")
    figure.colorbar(mesh, ax=axes, label="share of the loss that the step takes away", shrink=0.9)
    return figure


def conflict_table(run: RunFolder, method: str) -> pd.DataFrame | None:
    """Return kind, layer, epoch, pairs, ``share`` in conflict, mean ``angle``, over all seeds; None if not recorded."""
    frames = [frame for item in run.of(method) if (frame := item.conflicts()) is not None]
    joined = pd.concat(frames, ignore_index=True).dropna(subset=["cosine"]) if frames else pd.DataFrame()
    if joined.empty:
        return None
    grouped = joined.assign(share=joined["cosine"] < 0).groupby(["kind", "layer", "epoch"], sort=False)
    return grouped.agg(pairs=("cosine", "size"), share=("share", "mean"), angle=("angle", "mean")).reset_index()


def conflict_plot(table: pd.DataFrame, value: str = "share") -> Figure:
    """Heat maps of what :func:`conflict_table` gave, blocks by number; see :func:`~libmtl_fair.report.theme.conflict_map`."""
    layers = sorted(set(table["layer"]), key=lambda name: (int("".join(filter(str.isdecimal, name)) or 0), name))
    return conflict_map(table, value, layers, sorted(set(table["epoch"])))


def branch_plots(run: RunFolder) -> Iterator[Plot]:
    """The first seed's tree of every method that branches, and the heat maps of every method that recorded conflicts."""
    for method in run.methods:
        if trees := branchings(run, method):
            others = f"; {len(trees) - 1} more below as text" if len(trees) > 1 else ""
            caption = f"{method}: branch tree as it ended, seed {trees[0].seed}{others}."
            yield Plot(f"tree_{slug(method)}", "branches", caption, trees[0].last.plot)
    for method in run.methods:
        if held := groupings(run, method):
            frames = [_affinity(each) for _, _, each in held]
            which = f"means over {len(held)} seeds" if len(held) > 1 else f"seed {held[0][1]}"
            caption = f"{method}: affinity of each two tasks in the joint training, {which}; the groups are in the table below."
            draw = partial(affinity_map, pd.concat(frames).groupby(level=0, sort=False).mean())
            yield Plot(f"affinity_{slug(method)}", "branches", caption, draw)
    titles = {
        "share": "share of task pairs whose gradients conflict",
        "angle": "mean angle between two tasks' gradients",
    }
    for method in run.methods:
        table = conflict_table(run, method)
        if table is None:
            continue
        seeds = sum(item.conflicts() is not None for item in run.of(method))
        which = f", all {seeds} seeds" if seeds > 1 else ""
        rest = f"the first batch of each epoch{which}; empty: no two tasks share it"
        for value, title in titles.items():
            caption = f"{method}: {title}, by layer and epoch ({rest})."
            yield Plot(f"conflicts_{value}_{slug(method)}", "branches", caption, partial(conflict_plot, table, value))
