"""Batches of rows that lie on disk: shuffled by blocks, sharded by processes, in an order that repeats."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.data.loader import Epoch, Order, ResidentLoader, _columns, _mix, _packed, _take, epoch_order
from libmtl_fair.data.reference import COMPONENTS, WIDEST, Reference
from libmtl_fair.faults import Faults, check_labels
from libmtl_fair.tasks import Task

BLOCK, WINDOW = 4096, 64
"""Rows that lie together, and blocks that are shuffled into each other."""
_LOOK = 2**17


class BlockLoader(ResidentLoader):
    """A :class:`ResidentLoader` of tensors that are read from disk as they are looked at.

    An epoch takes the blocks of 4,096 rows in a random order, 64 at a time, and the rows of these in a random order: what is in
    memory is a window of 262,144 rows, whatever the table has. A table of no more rows is taken in ResidentLoader's own order. Without
    ``shuffle`` rows come as they lie. Everything else is as there: processes take shares of each batch, the state is the seed and the
    epoch. Each batch goes to the device by itself.

    Parameters
    ----------
    *args, **settings : object
        As :class:`ResidentLoader`; tensors that were checked when they were prepared.
    maps : sequence of mmap
        The files that the tensors are read from.
    block, window : int
        Rows of a block, and blocks of a window.
    """

    def __init__(
        self, *args: Any, maps: Sequence[mmap.mmap] = (), block: int = BLOCK, window: int = WINDOW, **settings: Any
    ) -> None:
        self.maps, self.block, self.window = tuple(maps), block, window
        super().__init__(*args, **settings)

    _table = staticmethod(lambda x, labels, groups, **more: _Rows(x, labels, groups or {}, **more))  # type: ignore[assignment]

    def _hold(self, rows: Any) -> None:
        self._rows: _Rows = rows

    def at(self, rows: Tensor | slice) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return inputs, labels and groups of some rows, on the device."""
        held = self._rows
        parts = (
            _packed({n: _take(c, rows) for n, c in each.items()}, self.device) for each in (held.labels, held.groups)
        )
        labels, groups = (_columns(packs, slice(None)) for packs in parts)
        return _take(held.x, rows).to(self.device), labels, groups

    def reference_at(self, x: Tensor, rows: Tensor | slice) -> Tensor | None:
        """Return the reference features of some rows, whose inputs are ``x``; None where there are none."""
        if self._given is None:
            return None
        assert isinstance(self._given, Reference)
        found = self._given.features(x)
        if found.shape[1] <= WIDEST:
            return found
        mean, directions = self._components
        return (found - mean.to(found)) @ directions.to(found)

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the first principal components of the reference features, by two looks through them."""
        assert isinstance(self._given, Reference)
        parts = [slice(at, at + _LOOK) for at in range(0, self.n_rows, _LOOK)]
        width = len(self._given.columns)
        mean, products = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for part in parts:
            mean += self._given.features(self._rows.x[part]).double().sum(0) / self.n_rows
        for part in parts:
            centred = self._given.features(self._rows.x[part]).double() - mean
            products += centred.T @ centred
            self.let_go()
        return mean, torch.linalg.eigh(products).eigenvectors[:, -COMPONENTS:]

    def check(self, tasks: Iterable[Task | None]) -> None:
        """Raise DataError where labels are none of the task's kind; every task is looked at once."""
        for task in tasks:
            if task is not None and task not in self._checked and task.name in self._rows.labels:
                labels, faults = self._rows.labels[task.name], Faults()
                for at in range(0, self.n_rows, _LOOK):
                    check_labels(faults, task, labels[at : at + _LOOK])
                faults.check()
                self._checked.add(task)

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch of its own."""
        self.epoch += 1
        return _Epoch(self, self._order(self.epoch - 1) if self.shuffle else None)

    def _order(self, epoch: int) -> Order:
        if self.n_rows <= self.block * self.window:
            return epoch_order(self.seed, epoch, self.n_rows, torch.device("cpu"))
        return _Windows(self, _mix(self.seed, epoch))

    def let_go(self) -> None:
        """Tell the system that what was looked at need not stay in memory."""
        for each in self.maps:
            if hasattr(each, "madvise"):  # not on every system
                each.madvise(mmap.MADV_DONTNEED)

    def state_dict(self) -> dict[str, int]:
        """Return what the order of the coming epochs depends on. An epoch under way is not part of it."""
        return {**super().state_dict(), "block": self.block, "window": self.window}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken; see :meth:`ResidentLoader.load_state_dict`."""
        super().load_state_dict(state)
        self.block, self.window = int(state.get("block", self.block)), int(state.get("window", self.window))


class _Rows:
    """Rows that were checked when they were prepared, as :class:`TableDataset` has them."""

    def __init__(
        self,
        x: Tensor,
        labels: Mapping[str, Tensor],
        groups: Mapping[str, Tensor],
        *,
        group_names: Mapping[str, Any],
        **more: Any,
    ) -> None:
        self.x, self.labels, self.groups = x, dict(labels), dict(groups)
        self.group_names = {name: list(group_names[name]) for name in self.groups}
        self.n_groups = {name: len(names) for name, names in self.group_names.items()}
        self.task_names, self.reference, self.twins = tuple(self.labels), more.get("reference"), more.get("twins")

    def __len__(self) -> int:
        return len(self.x)


class _Epoch(Epoch):
    """A pass that lets go of what lies behind it."""

    _taken = 0

    def _take(self) -> Any:
        loader = self._loader
        assert isinstance(loader, BlockLoader)
        self._taken += loader.batch_size
        if self._taken >= loader.block * loader.window:
            self._taken = 0
            loader.let_go()
        return super()._take()


class _Windows:
    """The order of an epoch, of which a window at a time is made."""

    def __init__(self, loader: BlockLoader, seed: int) -> None:
        self._block, self._n, self._seed = loader.block, loader.n_rows, seed
        blocks = torch.randperm(-(-self._n // self._block), generator=torch.Generator().manual_seed(seed))
        self._windows = torch.split(blocks, loader.window)
        sizes = torch.tensor([int((self._ends(each) - each * self._block).sum()) for each in self._windows])
        self._starts = [0, *sizes.cumsum(0).tolist()]
        self._held: dict[int, Tensor] = {}

    def _ends(self, blocks: Tensor) -> Tensor:
        return ((blocks + 1) * self._block).clamp(max=self._n)

    def _window(self, number: int) -> Tensor:
        if number not in self._held:
            blocks = self._windows[number]
            rows = torch.cat(
                [torch.arange(a, b) for a, b in zip((blocks * self._block).tolist(), self._ends(blocks).tolist())]
            )
            drawn = torch.Generator().manual_seed(_mix(self._seed, number))
            found = rows[torch.randperm(len(rows), generator=drawn)]
            self._held = {n: held for n, held in self._held.items() if n >= number - 1} | {number: found}
        return self._held[number]

    def __getitem__(self, places: slice) -> Tensor:
        """Return the rows of places start:stop."""
        found = [torch.empty(0, dtype=torch.int64)]  # all that a process has of a batch of fewer rows than processes
        for number, first in enumerate(self._starts[:-1]):
            low, high = max(places.start, first), min(places.stop, self._starts[number + 1])
            if low < high:
                found.append(self._window(number)[low - first : high - first])
        return torch.cat(found)
