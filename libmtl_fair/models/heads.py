"""Heads: a task's last layers, and a dictionary of them that takes tasks of any name."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView
from contextlib import contextmanager

from torch import nn

from libmtl_fair.tasks import Task


class Heads(nn.ModuleDict):
    """Task -> head, for tasks of any name.

    torch's own refuses names with a dot, and those that its class uses itself (``type``, ``values``, ``forward``). Such a head is
    registered as ``%`` and the name, with ``%25`` for ``%`` and ``%2E`` for a dot; all others by their names, as torch does.

    Examples
    --------
    >>> heads = Heads({"hours.per.week": nn.Identity(), "income": nn.Identity()})
    >>> list(heads), [name for name, _ in heads.named_children()]
    (['hours.per.week', 'income'], ['%hours%2Eper%2Eweek', 'income'])
    """

    def __getitem__(self, key: str) -> nn.Module:
        """Return the head of a task."""
        try:
            return super().__getitem__(_registered(key))
        except KeyError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Give a task its head."""
        super().__setitem__(_registered(key), module)

    def __delitem__(self, key: str) -> None:
        """Take a task's head away."""
        super().__delitem__(_registered(key))

    def __contains__(self, key: object) -> bool:
        """Whether the task has a head."""
        return isinstance(key, str) and super().__contains__(_registered(key))

    def __iter__(self) -> Iterator[str]:
        """Yield the tasks' names."""
        return iter(self.keys())

    def pop(self, key: str) -> nn.Module:
        """Take a task's head away and return it."""
        module = self[key]
        del self[key]
        return module

    def keys(self) -> KeysView[str]:
        """Return the tasks' names."""
        return dict.fromkeys(map(_task_of, self._modules)).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        """Return tasks' names and heads."""
        return dict(zip(self.keys(), self.values())).items()


_BARE = nn.ModuleDict()


def _registered(name: str) -> str:
    fine = "." not in name and not name.startswith("%") and not hasattr(_BARE, name)
    return name if fine else "%" + name.replace("%", "%25").replace(".", "%2E")


def _task_of(registered: str) -> str:
    return registered[1:].replace("%2E", ".").replace("%25", "%") if registered.startswith("%") else registered


@contextmanager
def any_names(names: Iterable[str]) -> Iterator[None]:
    """Let ``nn.ModuleDict`` take these names, while open: LibMTL's architectures make some by task in their constructors."""
    own = nn.ModuleDict
    if any(_registered(name) != name for name in names):
        nn.ModuleDict = Heads  # type: ignore[misc]
    try:
        yield
    finally:
        nn.ModuleDict = own  # type: ignore[misc]


def linear_heads(tasks: Iterable[Task], in_features: int) -> nn.ModuleDict:
    """Return task name -> ``nn.Linear(in_features, task.out_features)``."""
    return Heads({task.name: nn.Linear(in_features, task.out_features) for task in tasks})
