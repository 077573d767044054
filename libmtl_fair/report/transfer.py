"""FairBranch's figures of transfer between tasks, from what a run records: gains per task, angles per epoch, conflicts task by task.

Source: arXiv:2310.13746, figures 4 (gains), 5 (angles) and 6, 7 (tasks by tasks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from libmtl_fair.report.run_folder import RunFolder
from libmtl_fair.report.summary import GAINS, gains
from libmtl_fair.report.theme import INK, PALETTE, Plot, canvas, label, slug, task_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOOD, _BAD = PALETTE[2], PALETTE[1]
KINDS = ("accuracy", "fairness")


def gain_triangles(found: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Triangles of each task's gain over its single-task model, of what :func:`~libmtl_fair.report.summary.gains` found.

    Up or down by its sign; of one colour where it is good, of another where it is negative transfer or bias transfer. A bar is the mean.
    """
    figure, panels = canvas(1.6 + 0.75 * max(len(methods), 5), 1.1 + 1.9 * len(GAINS), len(GAINS), 1, sharex=True)
    spread = np.linspace(-0.28, 0.28, max(len(set(found["task"])) - 1, 1))
    for axes, (name, title) in zip(panels, GAINS.items()):
        better = 1 if name == "knowledge" else -1
        for x, method in enumerate(methods):
            rows = found[(found["method"] == method) & found[name].notna()]
            values = rows[rows["task"] != "mean"][name].to_numpy(float)
            for up in (True, False):
                side = (values > 0) == up
                colour = _GOOD if up == (better > 0) else _BAD
                places = x + (spread[: len(values)] if len(values) > 1 else np.zeros(len(values)))
                axes.scatter(places[side], values[side], 34, colour, marker="^" if up else "v", linewidths=0, zorder=3)
            axes.hlines(rows[rows["task"] == "mean"][name], x - 0.36, x + 0.36, INK, linewidth=1.2)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(title)
    panels[-1].set_xticks(range(len(methods)), [label(m, 18) for m in methods], rotation=35, ha="right")
    panels[-1].set_xlim(-0.6, len(methods) - 0.4)
    return figure


def angle_boxes(frame: pd.DataFrame) -> Figure:
    """A box an epoch of the angles of conflict, those above 90 degrees, accuracy and fairness apart; their number above it."""
    epochs = sorted(set(frame["epoch"]))
    figure, panels = canvas(2 + 0.34 * max(len(epochs), 8), 4.6, 2, 1, sharex=True, sharey=True)
    for axes, kind, colour in zip(panels, KINDS, PALETTE):
        rows = frame[(frame["kind"] == kind) & (frame["cosine"] < 0)]
        each = [rows.loc[rows["epoch"] == epoch, "angle"].to_numpy(float) for epoch in epochs]
        shown = [i for i, angles in enumerate(each) if len(angles)]
        if shown:
            boxes = axes.boxplot(
                [each[i] for i in shown],
                positions=shown,
                patch_artist=True,
                widths=0.6,
                flierprops={"markersize": 2.5, "markeredgecolor": INK},
                medianprops={"color": INK},
                whiskerprops={"color": INK},
                capprops={"color": INK},
                boxprops={"edgecolor": INK},
            )
            for box in boxes["boxes"]:
                box.set_facecolor(colour)
        for i in shown if len(epochs) <= 24 else ():
            axes.text(i, 181, str(len(each[i])), ha="center", va="bottom", fontsize=7)
        axes.set(ylim=(88, 190), title=f"{kind} gradients", ylabel="angle (degrees)")
        axes.set_yticks((90, 120, 150, 180))
    step = -(-len(epochs) // 12)
    panels[-1].set_xticks(range(0, len(epochs), step), [str(e) for e in epochs[::step]])
    panels[-1].set_xlim(-0.7, len(epochs) - 0.3)
    panels[-1].set_xlabel("epoch")
    return figure


def task_conflicts(frame: pd.DataFrame, kind: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Return how often two tasks' gradients were in conflict, over epochs and layers: [tasks, tasks], symmetric, diagonal 0."""
    rows = frame[(frame["kind"] == kind) & (frame["cosine"] < 0)]
    counts = pd.crosstab(rows["task_a"], rows["task_b"])
    counts = counts.reindex(index=list(tasks), columns=list(tasks), fill_value=0)
    return counts + counts.T.to_numpy()


def task_map(frame: pd.DataFrame) -> Figure:
    """Heat maps of :func:`task_conflicts`, accuracy and fairness side by side."""
    tasks = list(dict.fromkeys([*frame["task_a"], *frame["task_b"]]))
    wide = 1.6 + 0.42 * len(tasks)
    figure, panels = canvas(2 * wide + 0.8, max(wide, 3.6), 1, 2, sharey=True)
    counts = [task_conflicts(frame, kind, tasks).to_numpy(float) for kind in KINDS]
    top = max(1.0, *(each.max(initial=0.0) for each in counts))
    for axes, kind, each in zip(panels, KINDS, counts):
        mesh = task_matrix(axes, each, tasks, "YlOrBr", 0, top)
        axes.set_title(f"{kind} gradients")
    figure.colorbar(mesh, ax=panels, label="conflicts", shrink=0.9)
    return figure


def transfer_plots(run: RunFolder) -> Iterator[Plot]:
    """Gains of every method that is not single-task, and angles and task maps of every method that recorded conflicts."""
    found = gains(run)
    if len(found):
        caption = (
            "Knowledge gain (above 0 is good) and discrimination gain (below 0 is good) of each task against its single-task model, "
            "means over seeds: green is good, red is negative transfer or bias transfer; the line is the mean over tasks."
        )
        draw = partial(gain_triangles, found, list(dict.fromkeys(found["method"])))
        yield Plot("gains", "utility", caption, draw)
    for method in run.methods:
        frames = [frame for item in run.of(method) if (frame := item.conflicts()) is not None and "task_a" in frame]
        joined = pd.concat(frames, ignore_index=True).dropna(subset=["cosine"]) if frames else pd.DataFrame()
        if joined.empty:
            continue
        rest = "the first batch of each epoch, all layers" + (f" and {len(frames)} seeds" if len(frames) > 1 else "")
        caption = f"{method}: angles of the task pairs in conflict ({rest}); their number stands above a box."
        yield Plot(f"angles_{slug(method)}", "branches", caption, partial(angle_boxes, joined))
        caption = f"{method}: conflicts of each two tasks, accumulated over {rest}."
        yield Plot(f"task_conflicts_{slug(method)}", "branches", caption, partial(task_map, joined))
