"""Encoders and heads: a multilayer perceptron as an ordered list of blocks, and linear heads."""

from __future__ import annotations

import itertools
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.tasks import Task

__all__ = ["MLP", "Heads", "linear_heads"]

_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """Linear, norm, ReLU, dropout; once per hidden width. Input [B, in_features], output [B, hidden[-1]].

    Parameters
    ----------
    in_features : int
        Width of the input.
    hidden : sequence of int, default (128, 64)
        Widths, at least one.
    dropout : float, default 0.0
        Probability in [0, 1).
    norm : str, optional
        None, ``"batch"`` or ``"layer"``.

    Notes
    -----
    ``blocks`` is the ordered list of layers, which FairBranch branches at.

    Examples
    --------
    >>> MLP(10, (8, 4)).out_features
    4
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int] = (128, 64), dropout: float = 0.0, norm: str | None = None
    ) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise RecipeError(f"hidden must be a list of widths of at least 1, found {list(hidden)}")
        if not 0 <= dropout < 1:
            raise RecipeError(f"dropout must be in [0, 1), found {dropout}")
        if norm is not None and norm not in _NORMS:
            raise RecipeError(unknown("norm", norm, _NORMS))
        widths = [in_features, *hidden]
        self.blocks = nn.ModuleList(_block(a, b, dropout, norm) for a, b in itertools.pairwise(widths))
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation, [B, hidden[-1]]."""
        for block in self.blocks:
            x = block(x)
        return x


def _block(width_in: int, width_out: int, dropout: float, norm: str | None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    if norm is not None:
        layers.append(_NORMS[norm](width_out))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


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
