"""Look and primitives of every picture: colours that colour-blind readers can tell apart, names as they are, maps, trees."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.files import atomic_path
from libmtl_fair.shown import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

REFERENCE = "#7f7f7f"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FDF", "#A6761D")
"""Okabe and Ito's colours (without black and yellow, which vanish on dark or light paper) and two more."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
Style = dict[str, Any]
"""Keyword arguments of matplotlib."""
INK, GRID = "#1b1b1f", "#d8d8de"
_DARK, _LIGHT, _TRUNK, _BRANCH = "#101014", "#fbfbfb", "#c9d6e2", "#f2c14e"
"""Text on bright and on dark areas, which no page recolours; boxes of a tree."""

_SETTINGS: Mapping[str, object] = (
    dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK)
    | dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False)
    | {"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "hatch.linewidth": 0.5}
    | {"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9, "lines.linewidth": 1.6}
    | {"svg.fonttype": "none", "savefig.dpi": 150}
)


@contextmanager
def themed(salt: str = "libmtl_fair") -> Iterator[None]:
    """Draw with this theme; a name in a script that the font lacks is no reason for a warning."""
    import matplotlib as mpl

    with mpl.rc_context(mpl.RcParams({**_SETTINGS, "svg.hashsalt": salt})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure (inches) and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).ravel())


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure on white paper, atomically; the file's ending says in which format, PNG where it has none."""
    kind = Path(path).suffix.lstrip(".") or "png"
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, format=kind, facecolor="white", metadata={"Software": None} if kind == "png" else None
        )
    return Path(path)


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
        stream = io.StringIO()
        with themed(self.name):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            self.figure.set_layout_engine("none")  # laid out anew it would move a little at each drawing
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r' id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
        wide = re.sub(r'<svg ([^>]*?)width="([\d.]+pt)"', r'<svg style="--natural: \2" \1width="\2"', text, count=1)
        alt = f'<svg role="img" aria-label="{html.escape(self.caption)}"'
        return wide.replace("<svg", alt, 1).replace(INK, "var(--ink)").replace(GRID, "var(--grid)")

    def save(self, folder: Path) -> Path | None:
        """Write the plot as PNG and return its path, None if there is nothing to draw."""
        with themed(self.name):
            return save(self.figure, folder / f"{self.name}.png") if self.figure is not None else None


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Colour of each method: grey for the first, the reference.

    >>> colours(["plain", "relif"])
    {'plain': '#7f7f7f', 'relif': '#0072B2'}
    """
    return {name: REFERENCE if i == 0 else PALETTE[(i - 1) % len(PALETTE)] for i, name in enumerate(methods)}


def label(text: object, longest: int = 40) -> str:
    """Text for a plot: shortened, on one line, and never hidden from a legend by a leading underscore."""
    line = printable(" ".join(str(text).split()))
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line


def slug(text: object) -> str:
    """A file name from any text.

    >>> slug("hours > 40?")
    'hours_40'
    """
    return re.sub(r"[^A-Za-z0-9]+", "_", str(text)).strip("_")[:60] or "unnamed"


def task_matrix(
    axes: Axes, values: NDArray[np.float64], names: Sequence[str], colours: str, low: float, top: float
) -> QuadMesh:
    """Draw numbers [T, T] of each two tasks, but for the diagonal: a row and a column a task."""
    edges = np.arange(len(names) + 1) - 0.5
    shown = np.ma.masked_array(values, np.eye(len(names), dtype=bool) | ~np.isfinite(values))
    mesh = axes.pcolormesh(edges, edges, shown, cmap=colours, vmin=low, vmax=top)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(names)), [label(name, 20) for name in names], rotation=90)
    axes.set_yticks(range(len(names)), [label(name, 20) for name in names])
    return mesh


_MAPS: Mapping[str, tuple[str, str, str]] = {
    "conflicts": ("conflicting pairs", "YlOrBr", "{:.0f}"),
    "share": ("share of pairs in conflict", "YlOrBr", "{:.0%}"),
    "angle": ("mean angle (degrees)", "PuOr_r", "{:.0f}°"),
}
"""What a map of conflicts shows: its unit, its colours, how a number is written."""


def conflict_map(table: pd.DataFrame, value: str, layers: Sequence[str], epochs: Sequence[int]) -> Figure:
    """Heat maps of accuracy and fairness gradients: a row a layer (the input below), a column an epoch.

    A cell is empty where no two tasks share the layer. Source: the conflict maps of arXiv:2310.13746; shares in place of
    counts are ours, since branches change the number of pairs.

    Parameters
    ----------
    table : DataFrame
        Columns kind, layer, epoch and ``value``.
    value : str
        ``"conflicts"`` (task pairs at an angle above 90 degrees), their ``"share"``, or the mean ``"angle"``.
    """
    unit, shades, written = _MAPS[value]
    few = len(layers) * len(epochs) <= 120 and len(epochs) <= 12
    wide, high = 1.9 + (0.52 if few else 0.26) * max(len(epochs), 8), 1.3 + 2 * (0.5 + 0.32 * len(layers))
    figure, panels = canvas(wide, high, 2, 1, sharex=True)
    figure.set_layout_engine("constrained", hspace=0.06)
    low, top = _range(table[value].to_numpy(float), value)
    for axes, kind in zip(panels, ("accuracy", "fairness")):
        cells = table[table["kind"] == kind].pivot(index="layer", columns="epoch", values=value)
        numbers = cells.reindex(index=list(layers), columns=list(epochs)).to_numpy(dtype=float)
        edges = [np.arange(n + 1) - 0.5 for n in numbers.shape[::-1]]
        mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(numbers), cmap=shades, vmin=low, vmax=top)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(f"{kind} gradients")
        axes.set_yticks(range(len(layers)), [label(name, 24) for name in layers])
        for (i, j), number in np.ndenumerate(numbers) if few else ():
            if np.isfinite(number):
                bright = np.dot(mesh.cmap(mesh.norm(number))[:3], [0.299, 0.587, 0.114]) > 0.5
                ink = _DARK if bright else _LIGHT
                axes.text(j, i, written.format(number), ha="center", va="center", fontsize=8, color=ink)
    step = -(-len(epochs) // 12)
    panels[-1].set_xticks(range(0, len(epochs), step), [str(epoch) for epoch in epochs[::step]])
    panels[-1].set_xlabel("epoch")
    figure.colorbar(mesh, ax=panels, label=unit, shrink=0.9)
    return figure


def _range(values: NDArray[np.float64], value: str) -> tuple[float, float]:
    """Shares from 0 to 1, counts up to the largest; angles as far from 90 degrees, to both sides, as any (at least 30)."""
    known = values[np.isfinite(values)]
    if value != "angle":
        return 0.0, 1.0 if value == "share" else float(known.max(initial=1.0))
    wide = 15 * np.ceil(max(30.0, float(np.abs(known - 90).max(initial=0.0))) / 15)
    return 90 - wide, 90 + wide


def tree_figure(tasks: Sequence[str], levels: Sequence[Sequence[Sequence[str]]], depth: int) -> Figure:
    """A branch tree, input below: a box a copy of a block, blue for the trunk of ``depth`` blocks, yellow for branches."""
    path = {t: [next(i for i, group in enumerate(level) if t in group) for level in levels] for t in tasks}
    order = sorted(tasks, key=lambda task: path[task])  # no two branches cross
    at = {task: float(i) for i, task in enumerate(order)}
    rows = [*levels, [(task,) for task in order]]
    wide = max(0.75, 0.25 + 0.075 * max(len(label(task, 20)) for task in order)) * len(order)
    figure, (axes,) = canvas(max(3.6, wide), 0.4 + 0.6 * len(rows))
    for y, groups in enumerate(rows):
        for group in groups:
            x = float(np.mean([at[task] for task in group]))
            if y:
                below = next(g for g in rows[y - 1] if group[0] in g)
                start = float(np.mean([at[task] for task in below]))
                axes.plot([start, x], [y - 1, y], color=INK, linewidth=1, zorder=1)
            block = (f"block {y + 1}", _TRUNK if y < depth else _BRANCH)
            text, colour = block if y < len(levels) else (label(group[0], 20), "white")
            box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": INK, "linewidth": 0.8}
            axes.text(x, y, text, ha="center", va="center", size=8, color=_DARK, parse_math=False, bbox=box, zorder=2)
    axes.set_axis_off()
    axes.set(xlim=(-0.55, len(order) - 0.45), ylim=(-0.4, len(levels) + 0.4))
    axes.set_title("Branch tree: input below, tasks above", fontsize=10, color=INK)
    return figure
