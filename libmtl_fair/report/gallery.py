"""Which plots a run deserves, and how they become files (PNG) or inline pictures (SVG)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from libmtl_fair.files import atomic_path
from libmtl_fair.report.branches import conflict_plots, tree_plots
from libmtl_fair.report.frames import groups_frame, number
from libmtl_fair.report.pareto import disparities, pareto_plot
from libmtl_fair.report.plots import (
    bar_metrics,
    dual_plot,
    group_bars,
    shrinkage_plot,
    trace_plot,
    utility_bias_plot,
    weight_plot,
)
from libmtl_fair.report.run_folder import RunFolder, read_run
from libmtl_fair.report.theme import GRID, INK, slug, themed

_CONTROLLER = ("lambda", "r_smooth")
_TITLES = {"lambda": "λ", "r_smooth": "violation rate r̃"}


@dataclass(frozen=True)
class Plot:
    """A plot with the name of its file and its caption."""

    name: str
    section: str
    caption: str
    draw: Callable[[], Figure | None]

    @cached_property
    def figure(self) -> Figure | None:
        """The figure, drawn once; None if there is nothing to draw."""
        with themed(self.name):
            return self.draw()

    def svg(self) -> str:
        """Return the plot as SVG for a page: colours of ink and grid follow the page's; '' if there is nothing."""
        if self.figure is None:
            return ""
        with themed(self.name):
            stream = io.StringIO()
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r' id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
        wide = re.sub(r'<svg ([^>]*?)width="([\d.]+pt)"', r'<svg style="--natural: \2" \1width="\2"', text, count=1)
        return wide.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")

    def save(self, folder: Path) -> Path | None:
        """Write the plot as PNG and return its path, None if there is nothing to draw."""
        if self.figure is None:
            return None
        path = folder / f"{self.name}.png"
        with themed(self.name), atomic_path(path) as temporary:
            self.figure.savefig(temporary, format="png", facecolor="white", metadata={"Software": None})
        return path


def plots_of(run: RunFolder) -> Iterator[Plot]:
    """Every plot that the run's numbers and traces allow."""
    yield Plot("utility_bias", "audit", "Utility against Bias, mean ± sd over seeds.", partial(utility_bias_plot, run))
    caption = "Bias against Brier; the line is the reference with its scores shrunk towards a constant."
    yield Plot("shrinkage", "audit", caption, partial(shrinkage_plot, run))
    groups = groups_frame(run)
    taken: set[str] = set()
    for column in disparities(run):
        caption = f"Utility against {column}, means over seeds; numbers are those at the end of the methods' names."
        yield Plot(_free(f"pareto_{slug(column)}", taken), "groups", caption, partial(pareto_plot, run, column))
    for task, attribute in dict.fromkeys(zip(groups["task"], groups["attribute"])):
        if bar_metrics(groups, task, attribute):
            name = _free(f"groups_{slug(task)}_{slug(attribute)}", taken)
            yield Plot(name, "groups", f"{task} by {attribute}", partial(group_bars, run, task, attribute))
    for method, caption, draw in tree_plots(run):
        yield Plot(_free(f"tree_{slug(method)}", taken), "branches", caption, draw)
    for value, method, caption, draw in conflict_plots(run):
        yield Plot(_free(f"conflicts_{value}_{slug(method)}", taken), "branches", caption, draw)
    for method in run.methods:
        yield from _trace_plots(run, method, taken)


def _trace_plots(run: RunFolder, method: str, taken: set[str]) -> Iterator[Plot]:
    found = {f"seed {item.seed}": item.history() for item in run.of(method)}
    histories = {name: frame for name, frame in found.items() if frame is not None and len(frame)}
    if not histories:
        return
    settings = run.of(method)[0].metrics.get("settings") or {}
    target, epsilon = number(settings.get("target")), number(settings.get("epsilon"))
    stem = slug(method)
    if _has(histories, *_CONTROLLER):
        targets = {"r_smooth": target} if target == target else {}
        caption = f"{method}: λ and the smoothed violation rate" + (
            f" (dashed: target {target:g})." if targets else "."
        )
        draw = partial(trace_plot, histories, _CONTROLLER, targets, _TITLES)
        yield Plot(_free(f"controller_{stem}", taken), "traces", caption, draw)
    first = next(iter(histories.values()))
    if _has(histories, "eta", "phi"):
        known = epsilon if epsilon == epsilon else None
        caption = f"{method}: dual variable against " + (f"Φ − ε (ε = {epsilon:g})" if known is not None else "Φ")
        yield Plot(_free(f"dual_{stem}", taken), "traces", f"{caption}, first seed.", partial(dual_plot, first, known))
    for prefix, what in (("w/", "disparity weights w*"), ("alpha/", "task weights α")):
        if any(str(column).startswith(prefix) for column in first):
            name = _free(f"{slug(prefix)}_{stem}", taken)
            yield Plot(name, "traces", f"{method}: {what}, first seed.", partial(weight_plot, first, prefix))
    losses = [str(column) for column in first if str(column).startswith("loss/")][:6]
    if losses:
        titles = {column: column.removeprefix("loss/") for column in losses}
        draw = partial(trace_plot, histories, losses, None, titles)
        yield Plot(_free(f"losses_{stem}", taken), "losses", f"{method}: training loss of each task.", draw)


def _has(histories: dict[str, pd.DataFrame], *columns: str) -> bool:
    return any(column in frame and frame[column].notna().any() for frame in histories.values() for column in columns)


def _free(name: str, taken: set[str]) -> str:
    number_ = 1
    unique = name
    while unique.lower() in taken:
        number_ += 1
        unique = f"{name}_{number_}"
    taken.add(unique.lower())
    return unique


def write_plots(run: RunFolder | str | Path, plots: Iterable[Plot] | None = None) -> list[Path]:
    """Write every plot of a run (or those given) as PNG into ``RUN/plots`` and return the paths.

    Raises
    ------
    CheckpointError : the run folder is incomplete or damaged, or the folder cannot be written.
    """
    run = run if isinstance(run, RunFolder) else read_run(run)
    found = plots_of(run) if plots is None else plots
    return [path for plot in found if (path := plot.save(run.path / "plots")) is not None]
