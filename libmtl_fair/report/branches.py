"""Branching methods in the report: the tree as it ended, its events, and the conflicts between the tasks' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.methods.fairbranch.tree import BranchTree
from libmtl_fair.metrics.conflicts import KINDS
from libmtl_fair.report.run_folder import RunFolder, SeedRun
from libmtl_fair.report.sections import Sheet, sheet
from libmtl_fair.report.theme import label

VALUES = {"share": "share of pairs in conflict", "angle": "mean angle (degrees)"}
"""What a heat map shows -> its unit."""
_SHADES = {"share": "YlOrBr", "angle": "PuOr_r"}
_WRITTEN = 120


@dataclass(frozen=True)
class Branching:
    """The branches of one method and seed.

    Attributes
    ----------
    last : the tree after the last epoch.
    chosen : the tree of the checkpoint that the numbers are of.
    events : the events that led to ``last``, as :class:`~libmtl_fair.methods.fairbranch.fairbranch.BranchEvent` spells them.
    """

    method: str
    seed: int
    last: BranchTree
    chosen: BranchTree
    events: tuple[dict[str, Any], ...]


def branchings(run: RunFolder, method: str) -> list[Branching]:
    """Return the branches of every seed of a method; empty for a method that does not branch.

    Raises
    ------
    CheckpointError : a ``structure.json`` is damaged.
    """
    return [found for item in run.of(method) if (found := _branching(item)) is not None]


def _branching(item: SeedRun) -> Branching | None:
    content = item.structure()
    if content is None:
        return None
    try:
        last, chosen = (BranchTree.from_dict(content[part]["tree"]) for part in ("last", "chosen"))
        events = tuple(dict(event) for event in content["last"]["events"])
    except (FairMTLError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{item.folder / 'structure.json'} is damaged ({error}); run again to make it anew"
        ) from error
    return Branching(item.method, item.seed, last, chosen, events)


def tree_texts(run: RunFolder) -> list[tuple[str, str]]:
    """Return (whose tree, drawn as text) for every method that branches; seeds with the same tree stand together."""
    found = []
    for method in run.methods:
        seeds: dict[str, list[int]] = {}
        for item in branchings(run, method):
            text = str(item.last)
            if item.chosen != item.last:
                text += f"\n\nchosen checkpoint, which the numbers are of:\n{item.chosen}"
            seeds.setdefault(text, []).append(item.seed)
        for text, which in seeds.items():
            found.append((f"{method}, seed{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}", text))
    return found


def event_sheet(run: RunFolder) -> Sheet | None:
    """Every branch event: when, which block, the groups of tasks after it, and the similarities that decided."""
    body = []
    for method in run.methods:
        for item in branchings(run, method):
            body += [[method, item.seed, *_event(event)] for event in item.events]
    heads = ["method", "seed", "epoch", "block", "copies for", "most alike"]
    note = "Similarity is linear CKA of the weights one layer above the block; pairs at or above the threshold share a copy."
    return sheet("Branch events", heads, body, note) if body else None


def _event(event: dict[str, Any]) -> list[object]:
    groups, compared = event.get("groups") or [], event.get("compared") or []
    epoch = event.get("epoch")
    similar = np.array(event.get("similarity") or [[]], dtype=float)
    text = "–"
    if similar.ndim == 2 and len(similar) > 1 and similar.shape == (len(compared), len(compared)):
        a, b = np.unravel_index(int(np.argmax(similar - 2 * np.eye(len(similar)))), similar.shape)
        text = f"{_names(compared[a])} and {_names(compared[b])}: {similar[a, b]:.2f}"
    return ["–" if epoch is None else epoch, event.get("block", "–"), "; ".join(map(_names, groups)), text]


def _names(group: Any) -> str:
    return " + ".join(map(str, group))


def conflict_table(run: RunFolder, method: str) -> pd.DataFrame | None:
    """Return kind, layer, epoch, pairs, ``share`` in conflict, mean ``angle``, over all seeds; None if not recorded.

    Raises
    ------
    CheckpointError : a ``conflicts.csv`` is damaged.
    """
    frames = [frame for item in run.of(method) if (frame := item.conflicts()) is not None]
    joined = pd.concat(frames, ignore_index=True).dropna(subset=["cosine"]) if frames else pd.DataFrame()
    if joined.empty:
        return None
    joined = joined.assign(share=joined["cosine"] < 0)
    grouped = joined.groupby(["kind", "layer", "epoch"], sort=False)
    return grouped.agg(pairs=("cosine", "size"), share=("share", "mean"), angle=("angle", "mean")).reset_index()


def conflict_plot(table: pd.DataFrame, value: str = "share") -> Figure:
    """Heat maps of accuracy and fairness gradients: a row a layer (the input below), a column an epoch.

    ``value`` is ``"share"`` of task pairs in conflict (an angle above 90 degrees) or the mean ``"angle"``. A cell is empty
    where no two tasks share the layer. Source: the conflict maps of arXiv:2310.13746; shares instead of counts are ours,
    since branches change the number of pairs.
    """
    layers, epochs = sorted(set(table["layer"]), key=_layer_key), sorted(set(table["epoch"]))
    few = len(layers) * len(epochs) <= _WRITTEN and len(epochs) <= 12
    size = (1.9 + (0.52 if few else 0.26) * max(len(epochs), 8), 1.3 + 2 * (0.5 + 0.32 * len(layers)))
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(2, 1, sharex=True)
    cells_of = {kind: _cells(table, kind, layers, epochs, value) for kind in KINDS}
    low, high = _range(cells_of.values(), value)
    for axes, kind in zip(panels, KINDS):
        mesh = _mesh(axes, cells_of[kind], value, low, high)
        axes.set_yticks(range(len(layers)), [label(name, 24) for name in layers])
        axes.set_title(f"{kind} gradients")
        if few:
            _write(axes, cells_of[kind], mesh, value)
    step = -(-len(epochs) // 12)
    panels[-1].set_xticks(range(0, len(epochs), step), [str(epoch) for epoch in epochs[::step]])
    panels[-1].set_xlabel("epoch")
    figure.colorbar(mesh, ax=panels, label=VALUES[value], shrink=0.9)
    return figure


def _layer_key(name: str) -> tuple[int, str]:
    """Blocks by number."""
    digits = "".join(char for char in name if char.isdecimal())
    return (int(digits) if digits else 0, name)


def _cells(table: pd.DataFrame, kind: str, layers: list[str], epochs: list[int], value: str) -> Any:
    wide = table[table["kind"] == kind].pivot(index="layer", columns="epoch", values=value)
    return wide.reindex(index=layers, columns=epochs).to_numpy(dtype=float)


def _range(cells: Iterable[Any], value: str) -> tuple[float, float]:
    """Shares run from 0 to 1; angles as far from 90 degrees, to both sides, as any goes (at least 30)."""
    if value == "share":
        return 0.0, 1.0
    known = np.concatenate([part[np.isfinite(part)] for part in cells])
    wide = 15 * np.ceil(max(30.0, float(np.abs(known - 90).max(initial=0.0))) / 15)
    return 90 - wide, 90 + wide


def _mesh(axes: Any, cells: Any, value: str, low: float, high: float) -> Any:
    edges = [np.arange(n + 1) - 0.5 for n in cells.shape[::-1]]
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes.pcolormesh(*edges, np.ma.masked_invalid(cells), cmap=_SHADES[value], vmin=low, vmax=high)


def _write(axes: Any, cells: Any, mesh: Any, value: str) -> None:
    for (i, j), number in np.ndenumerate(cells):
        if np.isfinite(number):
            red, green, blue, _ = mesh.cmap(mesh.norm(number))
            ink = "#101014" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#fbfbfb"
            text = f"{number:.0%}" if value == "share" else f"{number:.0f}°"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)


def tree_plots(run: RunFolder) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Yield (method, caption, function that draws) for the first seed's tree of every method that branches."""
    for method in run.methods:
        found = branchings(run, method)
        if found:
            others = f"; {len(found) - 1} more below as text" if len(found) > 1 else ""
            yield method, f"{method}: branch tree as it ended, seed {found[0].seed}{others}.", found[0].last.plot


def conflict_plots(run: RunFolder) -> Iterator[tuple[str, str, str, Callable[[], Figure]]]:
    """Yield (value, method, caption, function that draws) for the heat maps of every method that recorded conflicts."""
    titles = {
        "share": "share of task pairs whose gradients conflict",
        "angle": "mean angle between two tasks' gradients",
    }
    for method in run.methods:
        table = conflict_table(run, method)
        if table is None:
            continue
        seeds = sum(item.conflicts() is not None for item in run.of(method))
        rest = (
            f"the first batch of each epoch{f', all {seeds} seeds' if seeds > 1 else ''}; empty: no two tasks share it"
        )
        for value, title in titles.items():
            yield (
                value,
                method,
                f"{method}: {title}, by layer and epoch ({rest}).",
                partial(conflict_plot, table, value),
            )
