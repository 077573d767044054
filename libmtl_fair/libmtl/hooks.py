"""LibMTL's own way to batches, for Trainers whose users have changed it: ``_prepare_dataloaders`` and ``_process_data``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from libmtl_fair.errors import DataError

_COUNTS = (int, list, tuple, Mapping, type(None))


class Hooks(Protocol):
    """What is asked of a trainer."""

    multi_input: bool
    task_name: list[str]
    _prepare_dataloaders: Any
    _process_data: Any


class Batches(Protocol):
    """A loader of known length."""

    def __iter__(self) -> Iterator[object]:
        """Return the batches."""

    def __len__(self) -> int:
        """Return their number."""


class _Batches(Iterator[object]):
    """An iterator with the ``.next()`` that iterators had, and LibMTL's scripts still call; it can tell whether it is at its end."""

    def __init__(self, found: Iterator[object]) -> None:
        self._found, self._ahead = found, list[object]()

    def __next__(self) -> object:
        return self._ahead.pop() if self._ahead else next(self._found)

    next = __next__

    def ended(self) -> bool:
        """Whether there is no further batch; looks at the next one."""
        if not self._ahead:
            self._ahead.extend(islice(self._found, 1))
        return not self._ahead


class _Wrapped:
    """A loader whose iterators have ``.next()``; everything else is the loader's own."""

    def __init__(self, loader: Batches) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[object]:
        return _Batches(iter(self._loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def prepare_dataloaders(self: Hooks, dataloaders: Any) -> tuple[object, object]:
    """Return what ``_process_data`` takes, [loader, iterator], and the number of its batches; one a task with ``multi_input``.

    The number is None where a loader does not say it, which :class:`FairTrainer` takes.
    """
    if not self.multi_input:
        wrapped = _Wrapped(dataloaders)
        return [wrapped, iter(wrapped)], _length(wrapped)
    each = {task: _Wrapped(dataloaders[task]) for task in self.task_name}
    return {task: [w, iter(w)] for task, w in each.items()}, [_length(w) for w in each.values()]


def _length(loader: Batches) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def next_batch(loader: list[Any]) -> Any:
    """Return the next batch of [loader, iterator]; one that has run out starts again."""
    try:
        return next(loader[1])
    except StopIteration:
        loader[1] = iter(loader[0])
        return next(loader[1])


class _Prepared:
    """What a user's ``_prepare_dataloaders`` makes of all loaders, when first asked for."""

    def __init__(self, trainer: Hooks, loaders: object) -> None:
        self.trainer, self._loaders = trainer, loaders
        self._made: tuple[Any, Any] | None = None

    def of(self, name: str) -> tuple[Any, int | None]:
        """Return a task's [loader, iterator], or whatever it is, and the number of its batches, None where nobody says."""
        if self._made is None:
            self._made = self.trainer._prepare_dataloaders(self._loaders)
        if not isinstance(self._made, (tuple, list)) or len(self._made) != 2 or not isinstance(self._made[1], _COUNTS):
            raise DataError(
                "_prepare_dataloaders must return what _process_data takes, and the number of batches, one a task with multi_input"
            )
        prepared, counts = self._made
        if not name:
            return prepared, counts
        return prepared[name], counts[name] if isinstance(counts, Mapping) else counts[
            self.trainer.task_name.index(name)
        ]


class Hooked:
    """A loader through a user's own ``_prepare_dataloaders`` and ``_process_data``."""

    def __init__(self, prepared: _Prepared, name: str, loader: object) -> None:
        self._prepared, self._name, self._loader = prepared, name, loader

    def __iter__(self) -> Iterator[object]:
        given, count = self._prepared.of(self._name)
        if isinstance(given, list) and isinstance(given[1], _Batches) and given[1].ended():  # by a pass before this one
            given[1] = iter(given[0])
        for _ in _to_end(given) if count is None else range(count):
            batch = self._prepared.trainer._process_data(given)
            if not isinstance(batch, (list, tuple)) or len(batch) not in (2, 3):
                raise DataError(
                    f"_process_data must return (inputs, labels), found {type(batch).__name__}"
                    + (f" of {len(batch)}" if isinstance(batch, (list, tuple)) else "")
                )
            yield batch

    def __len__(self) -> int:
        count = self._prepared.of(self._name)[1]
        if count is None:
            raise TypeError("the loader does not say how many batches it has")
        return int(count)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def _to_end(given: Any) -> Iterator[None]:
    """Yield as long as the iterator of [loader, iterator] has a batch, whichever ``_process_data`` has put there."""
    while not given[1].ended():
        yield


def hooked(trainer: Hooks, loaders: Mapping[str, object], given: object) -> dict[str, Hooked]:
    """Return task -> loader through the trainer's hooks."""
    prepared = _Prepared(trainer, given)
    return {name: Hooked(prepared, name, loader) for name, loader in loaders.items()}
