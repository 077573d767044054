"""The branch tree: which tasks share which copy of which block. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from libmtl_fair.errors import HostError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Group = tuple[str, ...]
"""Tasks that share one copy of a block, in task order."""


@dataclass(frozen=True)
class BranchTree:
    """Tasks, and for each block the groups of tasks that have a copy of it in common.

    Attributes
    ----------
    tasks : Group
        In task order.
    levels : tuple of tuple of Group
        One entry a block, from the input up: the groups of tasks, each with its own copy of the block. Groups are in
        the order of their first task; every group lies within one group of the block below.
    depth : int
        Number of blocks from the input that no event has reached yet (d_c): the trunk, shared by all tasks.

    Examples
    --------
    >>> tree = BranchTree.start(["a", "b", "c"], 2).branch([(0, 2), (1,)])
    >>> print(tree)
    block 1: all tasks
    ├─ block 2: a, c
    └─ block 2: b
    >>> BranchTree.from_dict(tree.to_dict()) == tree
    True
    """

    tasks: Group
    levels: tuple[tuple[Group, ...], ...]
    depth: int

    def __post_init__(self) -> None:
        """Check that every level is a partition of the tasks, nested in the one below."""
        if len(set(self.tasks)) != len(self.tasks) or not self.tasks or not self.levels:
            raise HostError(f"a branch tree needs distinct tasks and at least one block, found {self.tasks}")
        if not 0 <= self.depth <= len(self.levels):
            raise HostError(f"branch tree: depth must be in 0..{len(self.levels)}, found {self.depth}")
        for index, level in enumerate(self.levels):
            if sorted(t for group in level for t in group) != sorted(self.tasks) or () in level:
                raise HostError(f"branch tree: block {index + 1} must hold every task once, found {level}")
            below = self.levels[index - 1] if index else (self.tasks,)
            if not all(any(set(group) <= set(g) for g in below) for group in level):
                raise HostError(f"branch tree: the groups of block {index + 1} are not within those below: {level}")
            if index < self.depth and len(level) != 1:
                raise HostError(f"branch tree: block {index + 1} belongs to the trunk, but has {len(level)} copies")

    @classmethod
    def start(cls, tasks: Iterable[str], n_blocks: int) -> BranchTree:
        """Return the tree before any event: every block shared by all tasks."""
        names = tuple(tasks)
        return cls(names, ((names,),) * n_blocks, n_blocks)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the encoder."""
        return len(self.levels)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Task groups that the next event pairs: those of the last event, single tasks before any."""
        return self.levels[self.depth] if self.depth < self.n_blocks else tuple((task,) for task in self.tasks)

    @property
    def leaves(self) -> tuple[Group, ...]:
        """Groups of tasks that have the whole encoder in common."""
        return self.levels[-1]

    @property
    def n_branches(self) -> int:
        """Number of block copies beyond one of each block."""
        return sum(len(level) - 1 for level in self.levels)

    def branch(self, pairs: Sequence[Sequence[int]]) -> BranchTree:
        """Return the tree after one event: ``pairs`` are tuples of indices into :attr:`groups`, singletons included."""
        groups = self.groups
        if sorted(i for pair in pairs for i in pair) != list(range(len(groups))):
            raise HostError(f"branch event: the pairs {pairs} must name each of {len(groups)} groups once")
        if self.depth == 0:
            raise HostError("branch event: every block has been branched")
        joined = [tuple(sorted((t for i in pair for t in groups[i]), key=self.tasks.index)) for pair in pairs]
        new = tuple(sorted(joined, key=lambda group: self.tasks.index(group[0])))
        at = self.depth - 1
        return replace(self, levels=(*self.levels[:at], new, *self.levels[at + 1 :]), depth=at)

    def path(self, task: str) -> tuple[int, ...]:
        """Return, for each block, the index of the copy that this task runs through."""
        return tuple(next(i for i, group in enumerate(level) if task in group) for level in self.levels)

    @cached_property
    def parents(self) -> list[list[int]]:
        """For each block and copy, the index of the copy below that it receives its input from; 0 for the first block."""
        paths = {task: self.path(task) for task in self.tasks}
        return [[paths[group[0]][at - 1] if at else 0 for group in level] for at, level in enumerate(self.levels)]

    def branches(self) -> dict[Group, list[tuple[int, int]]]:
        """Return task group -> the (block, copy) that it has of its own: everything above the trunk."""
        found: dict[Group, list[tuple[int, int]]] = {}
        for level in range(self.depth, self.n_blocks):
            for index, group in enumerate(self.levels[level]):
                found.setdefault(group, []).append((level, index))
        return found

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return {
            "tasks": list(self.tasks),
            "levels": [[*map(list, level)] for level in self.levels],
            "depth": self.depth,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BranchTree:
        """Rebuild what :meth:`to_dict` gave.

        Raises
        ------
        HostError
            A field is missing, or the levels are no nested partitions.
        """
        missing = {"tasks", "levels", "depth"} - set(content)
        if missing:
            raise HostError(f"branch tree: {sorted(missing)[0]!r} is missing, found {sorted(content)}")
        levels = tuple(tuple(map(tuple, level)) for level in content["levels"])
        return cls(tuple(content["tasks"]), levels, content["depth"])

    def __str__(self) -> str:
        """Draw the tree as lines of text, from the input (top) to the heads."""
        trunk = "input" if not self.depth else f"block{'s 1-' if self.depth > 1 else ' '}{self.depth}: all tasks"
        if self.depth == self.n_blocks:
            return f"{trunk} (not branched)"
        return "\n".join([trunk, *self._below(self.depth, self.tasks, "")])

    def _below(self, level: int, within: Group, indent: str) -> Iterator[str]:
        children = [group for group in self.levels[level] if set(group) <= set(within)] if level < self.n_blocks else []
        for group in children:
            last = group == children[-1]
            yield f"{indent}{'└─' if last else '├─'} block {level + 1}: {', '.join(group)}"
            yield from self._below(level + 1, group, indent + ("   " if last else "│  "))

    def plot(self) -> Figure:
        """Return a matplotlib figure: trunk at the bottom, tasks at the top."""
        from libmtl_fair.report.theme import tree_figure

        return tree_figure(self.tasks, self.levels, self.depth)
