"""Branch trees as text and as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from libmtl_fair.architecture.tree import BranchTree, Group

_INK, _TRUNK, _BRANCH = "#33475b", "#c9d6e2", "#f2c14e"


def draw(tree: BranchTree) -> str:
    """Return the tree as lines of text, from the input (top) to the heads."""
    if tree.depth == tree.n_blocks:
        return f"{_trunk(tree)} (not branched)"
    lines = [_trunk(tree)] if tree.depth else ["input"]
    lines += _below(tree, tree.depth, tree.tasks, "")
    return "\n".join(lines)


def _trunk(tree: BranchTree) -> str:
    span = "1" if tree.depth == 1 else f"1-{tree.depth}"
    return f"blocks {span}: all tasks"


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
    figure = Figure(figsize=(max(4.0, 1.3 * len(order)), 1.0 + 0.9 * (tree.n_blocks + 1)), layout="constrained")
    axes = figure.subplots()
    centres = {task: float(i) for i, task in enumerate(order)}
    for level, groups in enumerate(tree.levels):
        for index, group in enumerate(groups):
            middle = _middle(group, centres)
            colour = _TRUNK if level < tree.depth else _BRANCH
            if level:
                parent = tree.levels[level - 1][tree.parent(level, index)]
                axes.plot([_middle(parent, centres), middle], [level - 1, level], color=_INK, linewidth=1, zorder=1)
            _box(axes, middle, level, f"block {level + 1}", colour)
    for task in order:
        leaf = next(group for group in tree.leaves if task in group)
        top = float(tree.n_blocks)
        axes.plot([_middle(leaf, centres), centres[task]], [top - 1, top], color=_INK, linewidth=1, zorder=1)
        _box(axes, centres[task], top, task, "white")
    axes.set_axis_off()
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_title("Branch tree: input below, tasks above", fontsize=10, color=_INK)
    return figure


def _task_order(tree: BranchTree) -> list[str]:
    """Return tasks so that no two branches cross."""
    return sorted(tree.tasks, key=lambda task: (*tree.path(task), tree.tasks.index(task)))


def _middle(group: Group, centres: dict[str, float]) -> float:
    return sum(centres[task] for task in group) / len(group)


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": _INK, "linewidth": 0.8}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=_INK, bbox=style, zorder=2)
