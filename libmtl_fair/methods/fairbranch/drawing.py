"""Branch trees as text and as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from libmtl_fair.methods.fairbranch.tree import BranchTree, Group

_INK, _TEXT, _TRUNK, _BRANCH = "#1b1b1f", "#101014", "#c9d6e2", "#f2c14e"
"""Lines and title, which a page may recolour; text on the boxes; the boxes."""


def draw(tree: BranchTree) -> str:
    """Return the tree as lines of text, from the input (top) to the heads."""
    if tree.depth == tree.n_blocks:
        return f"{_trunk(tree)} (not branched)"
    lines = [_trunk(tree)] if tree.depth else ["input"]
    lines += _below(tree, tree.depth, tree.tasks, "")
    return "\n".join(lines)


def _trunk(tree: BranchTree) -> str:
    return "block 1: all tasks" if tree.depth == 1 else f"blocks 1-{tree.depth}: all tasks"


def _below(tree: BranchTree, level: int, within: Group, indent: str) -> list[str]:
    if level == tree.n_blocks:
        return []
    children = [group for group in tree.levels[level] if set(group) <= set(within)]
    lines = []
    for i, group in enumerate(children):
        last = i == len(children) - 1
        lines.append(f"{indent}{'└─' if last else '├─'} block {level + 1}: {', '.join(group)}")
        lines += _below(tree, level + 1, group, indent + ("   " if last else "│  "))
    return lines


def plot(tree: BranchTree) -> Figure:
    """Return a matplotlib figure of the tree; a box a block copy, blue for the trunk, yellow for branches."""
    from matplotlib.figure import Figure

    order = _task_order(tree)
    longest = max(len(_short(task)) for task in order)
    wide, high = max(0.75, 0.25 + 0.075 * longest) * len(order), 0.4 + 0.6 * (tree.n_blocks + 1)
    figure = Figure(figsize=(max(3.6, wide), high), layout="constrained")
    axes = figure.subplots()
    centres = {task: float(i) for i, task in enumerate(order)}
    for level, groups in enumerate(tree.levels):
        for index, group in enumerate(groups):
            middle = _middle(group, centres)
            colour = _TRUNK if level < tree.depth else _BRANCH
            if level:
                parent = tree.levels[level - 1][tree.parents[level][index]]
                axes.plot([_middle(parent, centres), middle], [level - 1, level], color=_INK, linewidth=1, zorder=1)
            _box(axes, middle, level, f"block {level + 1}", colour)
    for task in order:
        leaf = next(group for group in tree.leaves if task in group)
        top = float(tree.n_blocks)
        axes.plot([_middle(leaf, centres), centres[task]], [top - 1, top], color=_INK, linewidth=1, zorder=1)
        _box(axes, centres[task], top, _short(task), "white")
    axes.set_axis_off()
    axes.set(xlim=(-0.55, len(order) - 0.45), ylim=(-0.4, tree.n_blocks + 0.4))
    axes.set_title("Branch tree: input below, tasks above", fontsize=10, color=_INK)
    return figure


def _short(task: str, longest: int = 20) -> str:
    line = " ".join(task.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _task_order(tree: BranchTree) -> list[str]:
    """Return tasks so that no two branches cross."""
    return sorted(tree.tasks, key=lambda task: (*tree.path(task), tree.tasks.index(task)))


def _middle(group: Group, centres: dict[str, float]) -> float:
    return sum(centres[task] for task in group) / len(group)


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": _INK, "linewidth": 0.8}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=_TEXT, parse_math=False, bbox=style, zorder=2)
