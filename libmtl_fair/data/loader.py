"""Rows of features, labels and group ids, checked once, and batches of them from tensors that live on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from libmtl_fair.batch import Columns
from libmtl_fair.data.flips import Twins
from libmtl_fair.data.reference import Reference, narrowed
from libmtl_fair.errors import DataError, near
from libmtl_fair.faults import Faults, check_labels, need_few_groups
from libmtl_fair.processes import current, launched
from libmtl_fair.tasks import Task

Array: TypeAlias = "Tensor | NDArray[Any]"
"""What loaders take: a tensor, a numpy array, or a table or column of pandas, polars, pyarrow, ..."""

Batch: TypeAlias = "tuple[Tensor, dict[str, Any]]"
"""``(x, labels)``: labels hold one tensor a task and, under ``"sensitive"``, a dict attribute -> int64 group ids.

Under ``"reference"`` they may hold what people are compared by, [B, r], and under ``"twins"`` the inputs of their flip twins."""

SENSITIVE = "sensitive"
"""Key under which a batch's labels hold the group ids; no task may have this name."""

_MOST_BEFORE = 10
"""Where no id is up to this and groups have no names, the values are no ids."""

REFERENCE = "reference"
"""Key under which a batch's labels hold the reference features, where there are any."""

TWINS = "twins"
"""Key under which a batch's labels hold the inputs of the same people with another sensitive value, where there are any."""


class TableDataset(Dataset[Batch]):
    """Rows ``(x, labels)`` with the structure of :class:`ResidentLoader`'s batches; tensors stay where they are.

    Use it with a DataLoader where the data must not live on the device, or rows need workers or samplers.

    Parameters
    ----------
    x, labels, groups, group_names, feature_names, reference : as there
        As for :class:`ResidentLoader`.

    Raises
    ------
    DataError
        As :class:`ResidentLoader`.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> rows = TableDataset(torch.eye(3), {"t": torch.arange(3)}, {"sex": torch.tensor([0, 1, -1])})
    >>> x, labels = next(iter(DataLoader(rows, batch_size=2, collate_fn=collate)))
    >>> labels["t"].tolist(), labels["sensitive"]["sex"].tolist()
    ([0, 1], [0, 1])
    """

    def __init__(
        self,
        x: Array,
        labels: Mapping[str, Array],
        groups: Mapping[str, Array] | None = None,
        *,
        group_names: Mapping[str, Sequence[str]] | None = None,
        feature_names: Sequence[str] = (),
        reference: Array | Reference | None = None,
        twins: Array | Twins | None = None,
    ) -> None:
        if not labels:
            raise DataError("a loader needs the labels of at least one task, found none; expected {task: labels[N]}")
        self.x = _features(x, feature_names)
        self.reference = _reference(reference, labels, len(self.x))
        self.twins = _twins(twins, labels, self.x)
        self.labels = {task: _labels(task, values, len(self.x)) for task, values in labels.items()}
        named: dict[str, Sequence[str]] = dict(group_names or {})
        self.groups = {name: _groups(name, ids, len(self.x), named) for name, ids in (groups or {}).items()}
        self.group_names = _names(self.groups, named)
        self.n_groups = {attribute: len(names) for attribute, names in self.group_names.items()}
        self.task_names: tuple[str, ...] = tuple(self.labels)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]

    def __getitem__(self, index: int) -> Batch:
        """Return one row."""
        labels: dict[str, object] = {task: values[index] for task, values in self.labels.items()}
        labels[SENSITIVE] = {attribute: ids[index] for attribute, ids in self.groups.items()}
        if self.reference is not None:
            if isinstance(self.reference, Reference):
                self.reference = self.reference.features(self.x)
            labels[REFERENCE] = self.reference[index]
        if isinstance(self.twins, Tensor):
            labels[TWINS] = self.twins[index]
        return self.x[index], labels


def collate(rows: list[Batch]) -> Batch:
    """Stack rows of a :class:`TableDataset` to a batch; torch's own collation does the same."""
    x, labels = default_collate(rows)
    return x, labels


def _as_array(values: object, what: str) -> NDArray[Any]:
    """Return an array of a table or column of any library: float64 with NaN where nullable numbers are missing."""
    if isinstance(values, np.ndarray | list | tuple):
        return np.asarray(values)
    from libmtl_fair.data.frames import as_array  # with pandas, which tensors do without

    return as_array(values, what)


def as_tensor(values: object, what: str, n_rows: int | None = None) -> Tensor:
    """Return ``values`` as a tensor. A numpy float64 array becomes torch's default dtype; a tensor keeps its own."""
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = _as_array(values, what)
        if array.dtype == object or array.dtype.kind in "USMm":
            raise DataError(
                f"{what}: expected a tensor or a numeric array, found dtype {array.dtype}; encode it as numbers"
            )
        if array.dtype.byteorder == ">" or any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.astype(array.dtype.newbyteorder("="), copy=True)
        tensor = torch.from_numpy(array)
        tensor = tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    if tensor.is_complex():
        raise DataError(f"{what}: expected real numbers, found {tensor.dtype}")
    found = len(tensor) if tensor.dim() else 0
    if n_rows is not None and found != n_rows:
        raise DataError(f"{what}: expected {n_rows} rows, as x has, found {found}")
    return tensor


def _features(x: Array, names: Sequence[str]) -> Tensor:
    """Return ``x`` [N, ...] with N >= 1 and every value finite."""
    tensor = as_tensor(x, "x")
    if tensor.dim() == 0 or len(tensor) == 0:
        raise DataError(
            f"x has no rows (shape {tuple(tensor.shape)}); expected [N, ...] with N >= 1: is the split empty?"
        )
    bad = ~torch.isfinite(tensor)
    if tensor.is_floating_point() and bool(bad.any()):
        row, *rest = torch.nonzero(bad)[0].tolist()
        column = f"column {rest[0]}" if rest else "the only column"
        if rest and rest[0] < len(names):
            column += f" ({names[rest[0]]!r})"
        raise DataError(
            f"x has {int(bad.sum())} values that are NaN or infinite, the first in {column}, row {row}; features must be "
            "finite: impute them (load_table does, with missing indicators) or drop the column"
        )
    return tensor


def _labels(task: str, values: Array, n_rows: int) -> Tensor:
    """Return labels [N, ...] in float or int64; NaN or -100 mean missing, infinity is refused."""
    if task == SENSITIVE:
        raise DataError(f"a task may not be named {SENSITIVE!r}: this key holds the group ids; rename the task")
    tensor = as_tensor(values, f"labels of task {task!r}", n_rows)
    if not tensor.is_floating_point():
        return tensor.to(torch.get_default_dtype() if tensor.dtype == torch.bool else torch.int64)
    infinite = int(torch.isinf(tensor).sum())
    if infinite:
        raise DataError(f"task {task!r}: {infinite} labels are infinite; use NaN for missing")
    return tensor


def _groups(attribute: str, values: Array, n_rows: int, names: dict[str, Sequence[str]]) -> Tensor:
    """Return group ids int64 [N], each at least -1 (unknown); ``names`` gets those of labels."""
    what = f"groups of sensitive attribute {attribute!r}"
    if not (isinstance(values, Tensor) or (isinstance(values, np.ndarray) and values.dtype.kind in "iuf")):
        from libmtl_fair.data.frames import group_ids

        values, found = group_ids(values, what, names.get(attribute))
        names |= {} if found is None else {attribute: found}
    tensor = as_tensor(values, what, n_rows)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise DataError(
            f"{what}: expected integer ids [N], found {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "give ids 0..G-1, and -1 where the group is not known"
        )
    if int(tensor.min()) < -1:
        raise DataError(f"{what}: found id {int(tensor.min())}; ids are 0..G-1, and -1 where the group is not known")
    need_few_groups(what, int(tensor.max()) + 1)
    return tensor.long()


def _names(groups: Mapping[str, Tensor], given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the name of every id of every attribute; where none are given they are ``"0"``, ``"1"``, ..."""
    for attribute in given:
        if attribute not in groups:
            raise DataError(
                f"group_names has {attribute!r}, which is no sensitive attribute here; there are: {list(groups)}"
            )
    names = {}
    for attribute, ids in groups.items():
        highest, known = int(ids.max()), ids[ids >= 0]
        if attribute not in given and len(known) and int(known.min()) > _MOST_BEFORE:
            raise DataError(
                f"groups of sensitive attribute {attribute!r}: the lowest id is {int(known.min())}, so these are numbers, such as "
                "ages, and no ids 0..G-1; bin them (numpy.digitize, pandas.cut), or give group_names"
            )
        names[attribute] = [str(name) for name in given.get(attribute, range(highest + 1))]
        if highest >= len(names[attribute]):
            raise DataError(
                f"sensitive attribute {attribute!r}: found group id {highest}, but only {len(names[attribute])} group "
                "names; give one name for each id"
            )
    return names


def _reference(given: Array | Reference | None, labels: Mapping[str, Array], n_rows: int) -> Tensor | Reference | None:
    """Return reference features as a tensor [N, r], finite; what makes them of ``x`` as it is."""
    if given is None:
        return None
    if REFERENCE in labels:
        raise DataError(f"a task may not be named {REFERENCE!r} where there is a reference; rename the task")
    if isinstance(given, Reference):
        return given
    found = as_tensor(given, "reference", n_rows)
    if found.dim() != 2 or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        what = (
            f"{found.dtype} of shape {list(found.shape)}" if found.dim() != 2 else "values that are not finite numbers"
        )
        raise DataError(f"reference: expected finite features [N, r], one row for each of x, found {what}")
    return found


def _twins(given: Array | Twins | None, labels: Mapping[str, Array], x: Tensor) -> Tensor | Twins | None:
    """Return the twins' inputs, finite and of the shape of ``x``; what makes them of ``x`` as it is."""
    if given is None or isinstance(given, Twins):
        return given
    if TWINS in labels:
        raise DataError(f"a task may not be named {TWINS!r} where there are flip twins; rename the task")
    found = as_tensor(given, "twins", len(x))
    if found.shape != x.shape or found.dtype != x.dtype or not bool(torch.isfinite(found).all()):
        raise DataError(
            f"twins: expected finite inputs of x's kind, {x.dtype} of shape {list(x.shape)}, with the sensitive value "
            f"changed; found {found.dtype} of shape {list(found.shape)}"
        )
    return found


class Packed(NamedTuple):
    """A batch taken apart: inputs, task -> labels, attribute -> group ids; columns of one matrix where they are that.

    ``reference`` gives the reference features [B, r], ``twins`` the inputs of a step's flip twins, by the number of the step;
    or None where there are none. ``sizes``: rows of each process, where the loader knows them; the processes need not ask then.
    """

    x: Any
    labels: Mapping[str, Tensor]
    groups: Mapping[str, Tensor]
    reference: Callable[[], Tensor | None] = lambda: None
    twins: Callable[[int], Tensor | None] = lambda turn: None
    sizes: Sequence[int] | None = None


class Resumable:
    """A loader whose coming epochs depend on its seed and how many there were, so that a training can go on."""

    n_rows: int
    batch_size: int
    seed: int
    epoch: int

    def state_dict(self) -> dict[str, int]:
        """Return what the order of the coming epochs depends on. An epoch under way is not part of it."""
        return {"seed": self.seed, "epoch": self.epoch, "n_rows": self.n_rows, "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken: the next epoch has the order that it would have had there.

        Raises
        ------
        DataError
            The state is of other data, another batch size, or lacks a field.
        """
        for field in ("n_rows", "batch_size"):
            if state.get(field) != getattr(self, field):
                raise DataError(
                    f"loader state: {field} is {state.get(field)}, expected {getattr(self, field)}; "
                    "resume with the data and settings that the state was saved with"
                )
        if "seed" not in state or "epoch" not in state:
            raise DataError(f"loader state: expected 'seed' and 'epoch', found {sorted(state)}")
        self.seed, self.epoch = int(state["seed"]), int(state["epoch"])


class ResidentLoader(Resumable):
    """Yield ``(x, labels)`` batches of tensors that were moved to the device once.

    An epoch draws one permutation on the device and each batch is gathered by it: no per-row Python, no copies between
    host and device. Columns of one dtype and shape (the labels of many binary tasks, the group ids of all attributes)
    are kept as one matrix, so that a batch costs the same number of kernels with 2 tasks as with 40. Iterators are
    independent of each other; every ``iter()`` starts the next epoch.

    Parameters
    ----------
    x : Array
        [N, ...] features, finite.
    labels : mapping of str to Array
        {task: [N] or [N, C]}; NaN (float) or -100 (integer) where missing.
    groups : mapping of str to Array, optional
        {attribute: [N]}; ids 0..G-1, -1 where not known, or labels (text, truth values), whose sorted names are the groups.
    batch_size : int
        Rows a batch, of all processes together.
    shuffle : bool
        A new order every epoch; without it batches are views of the data in its own order: do not write to them.
    seed : int, optional
        Of the order. Epoch e's order depends on ``(seed, e)`` and the kind of device only. None draws a seed from
        torch's global generator, as torch's DataLoader does.
    device : str or torch.device, default "auto"
        "auto" (cuda if there is one, else cpu) or a torch device.
    drop_last : bool, default False
        Leave out the last batch if it is not full.
    group_names : mapping of str to sequence of str, optional
        {attribute: names}, index = id. Without it ids count up to the highest found.
    feature_names : sequence of str, default ()
        Of the columns of ``x``, for messages.
    weights : Array, optional
        [N] of at least 0; needs ``shuffle``. An epoch then draws its N rows in proportion to them, a row of weight w
        floor or ceil of N w / sum(w) times (systematic resampling, **ours**). So every loss and every group statistic,
        of any method, is of the weighted population. Equal weights give the very order of no weights.
    reference : Tensor or None
        [N, r] finite, by whose Euclidean distance people are alike or not, for methods that compare near people: the
        embedding of a frozen model that saw no sensitive attribute, say; or a :class:`Reference`, which makes it of
        ``x``. Moved to the device when it is first asked for; of more than 64 columns it keeps 32 principal components.
    twins : Tensor or None
        The inputs of the same people with another sensitive value, of the shape of ``x``, for ReLiF's ``flip``; or
        :class:`Twins`, which makes them of ``x``. Only FairTrainer asks for them.
    sharded : bool, default True
        In several processes each takes its share of every batch, so that they train as one would. False: all take the same.

    Raises
    ------
    DataError
        Weights without ``shuffle``, lengths differ, a feature is not finite, a group id is below -1, or there would be
        no batch.

    Examples
    --------
    >>> import torch
    >>> loader = ResidentLoader(torch.eye(4), {"t": torch.arange(4)}, {"sex": torch.tensor([0, 1, 1, -1])},
    ...                         batch_size=3, shuffle=False, device="cpu")
    >>> [(len(x), labels["t"].tolist(), labels["sensitive"]["sex"].tolist()) for x, labels in loader]
    [(3, [0, 1, 2], [0, 1, 1]), (1, [3], [-1])]
    """

    def __init__(
        self,
        x: Array,
        labels: Mapping[str, Array],
        groups: Mapping[str, Array] | None = None,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int | None = None,
        device: str | torch.device = "auto",
        drop_last: bool = False,
        group_names: Mapping[str, Sequence[str]] | None = None,
        feature_names: Sequence[str] = (),
        weights: Array | None = None,
        reference: Array | Reference | None = None,
        twins: Array | Twins | None = None,
        sharded: bool = True,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise DataError(f"batch_size must be an integer of at least 1, found {batch_size!r}")
        rows = self._table(
            x, labels, groups, group_names=group_names, feature_names=feature_names, reference=reference, twins=twins
        )
        self.n_rows = len(rows)
        if drop_last and self.n_rows < batch_size:
            raise DataError(
                f"no batch: {self.n_rows} rows, batch_size={batch_size} and drop_last=True; lower batch_size or keep the last"
            )
        self.device = resolve_device(device)
        self.batch_size = batch_size
        self.shuffle, self.sharded = bool(shuffle), bool(sharded)
        self.drop_last = bool(drop_last)
        self.seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else int(seed)
        self.epoch = 0
        if weights is not None and not shuffle:
            raise DataError("weights: rows are drawn in proportion to them, which needs shuffle=True")
        self._weights = None if weights is None else _shares(weights, self.n_rows).to(self.device)
        self.task_names, self.group_names, self.n_groups = rows.task_names, rows.group_names, rows.n_groups
        self._given, self._reference = rows.reference, cast("Tensor | None", None)
        self._twins = rows.twins
        self._checked: set[Task] = set()
        self._hold(rows)

    _table = TableDataset

    def _hold(self, rows: TableDataset) -> None:
        self._x = rows.x.to(self.device).contiguous()
        self._labels = _packed(rows.labels, self.device)
        self._groups = _packed(rows.groups, self.device)

    def at(self, rows: Tensor | slice) -> tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return inputs, labels and groups of some rows; columns of one matrix where they are that."""
        return _take(self._x, rows), _columns(self._labels, rows), _columns(self._groups, rows)

    def reference_at(self, x: Tensor, rows: Tensor | slice) -> Tensor | None:
        """Return the reference features of some rows, whose inputs are ``x``; None where there are none."""
        return None if self.reference is None else _take(self.reference, rows)

    @property
    def reference(self) -> Tensor | None:
        """Return the reference features of all rows, [N, r <= 64], on the device; None where there are none."""
        if self._given is not None:
            given = self._given.features(self._x) if isinstance(self._given, Reference) else self._given.to(self.device)
            self._given, self._reference = None, narrowed(given).contiguous()
        return self._reference

    def check(self, tasks: Iterable[Task | None]) -> None:
        """Raise DataError where labels are none of the task's kind; every task is looked at once."""
        wanted = {task.name: task for task in tasks if task is not None and task not in self._checked}
        for name, labels in _columns(self._labels, slice(None)).items() if wanted else ():
            if (task := wanted.get(name)) is not None:
                faults = Faults()
                check_labels(faults, task, labels)
                faults.check()
                self._checked.add(task)

    def twins_of(self, x: Tensor, groups: Mapping[str, Tensor], rows: Tensor | slice, turn: int) -> Tensor | None:
        """Return the inputs of the flip twins of a batch's rows; None where no sensitive value is among the inputs."""
        if self._twins is None:
            return None
        self._twins = self._twins.to(self.device)
        return self._twins.at(x, groups, turn) if isinstance(self._twins, Twins) else _take(self._twins, rows)

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        full, rest = divmod(self.n_rows, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        """Start an epoch of its own."""
        order = self._order(self.epoch) if self.shuffle else None
        self.epoch += 1
        return Epoch(self, order)

    def _order(self, epoch: int) -> Order:
        order = epoch_order(self.seed, epoch, self.n_rows, self.device)
        if self._weights is None:
            return order
        generator = torch.Generator(device=self.device).manual_seed(_mix(~self.seed, epoch))
        start = torch.rand((), generator=generator, device=self.device, dtype=torch.float64)
        return systematic(self._weights, start).index_select(0, order)


class Order(Protocol):
    """Row numbers in the order in which an epoch takes them."""

    def __getitem__(self, places: slice, /) -> Tensor:
        """Return those of some places."""


class Epoch:
    """One pass over a loader's rows, in the given order or, without one, their own."""

    def __init__(self, loader: ResidentLoader, order: Order | None) -> None:
        self._loader, self._order = loader, order
        self._next, self._end = 0, len(loader)
        self._processes = current() if loader.sharded else None

    def __iter__(self) -> Epoch:
        return self

    def __next__(self) -> Batch:
        x, labels, groups, reference = self._take()[:4]
        taken = reference()
        return x, {**labels, SENSITIVE: dict(groups)} | ({} if taken is None else {REFERENCE: taken})

    def packed(self) -> Iterator[Packed]:
        """Yield the batches that are left with labels and groups as the matrices that they are."""
        while self._next < self._end:
            yield self._take()

    def _take(self) -> Packed:
        if self._next >= self._end:
            raise StopIteration
        loader = self._loader
        start = self._next * loader.batch_size
        stop = min(start + loader.batch_size, loader.n_rows)
        sizes = None
        if self._processes is not None:
            rank, size, n = self._processes.rank, self._processes.size, stop - start
            ends = [start + n * each // size for each in range(size + 1)]
            start, stop = ends[rank : rank + 2]
            sizes = [after - before for before, after in pairwise(ends)]
        self._next += 1
        rows = slice(start, stop) if self._order is None else self._order[start:stop]
        parts = loader.at(rows)
        reference = partial(loader.reference_at, parts[0], rows)
        return Packed(*parts, reference, partial(loader.twins_of, parts[0], parts[2], rows), sizes)

    next = __next__  # LibMTL's Trainer calls it


@dataclass(frozen=True)
class _Pack:
    """Columns of one dtype and shape as one matrix: [N, K, ...], or [N, ...] where K = 1."""

    names: tuple[str, ...]
    values: Tensor


def _columns(packs: Sequence[_Pack], rows: Tensor | slice) -> Mapping[str, Tensor]:
    """Return name -> rows of its column; columns of one matrix where there is one only."""
    found: list[Mapping[str, Tensor]] = []
    for pack in packs:
        taken = _take(pack.values, rows)
        found.append({pack.names[0]: taken} if len(pack.names) == 1 else Columns(pack.names, taken))
    return found[0] if len(found) == 1 else {name: column for part in found for name, column in part.items()}


def _shares(weights: Array, n_rows: int) -> Tensor:
    """Return how often an epoch draws the rows up to and including each, float64 [N]; the last is N."""
    values = weights if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights, dtype=np.float64))
    values = as_tensor(values, "weights", n_rows).double()
    if values.dim() != 1 or not bool(torch.isfinite(values).all() and values.min() >= 0 and values.sum() > 0):
        raise DataError("weights: expected [N] finite numbers of at least 0, not all of them 0")
    passed = values.cumsum(0)
    return passed * (n_rows / passed[-1])


def representative(weights: Tensor) -> Tensor:
    """Return N row numbers, ascending, that stand for N rows of these weights; all rows once where they are equal."""
    return systematic(_shares(weights, len(weights)), torch.tensor(0.5, dtype=torch.float64))


def systematic(shares: Tensor, start: Tensor) -> Tensor:
    """Return N row numbers, ascending: row i as often as points ``start + k`` (in (0, 1) + 0..N-1) fall into its share."""
    points = torch.arange(len(shares), device=shares.device, dtype=torch.float64) + start.clamp(1e-6, 1 - 1e-6)
    found = torch.searchsorted(shares, points, right=True)
    last = torch.searchsorted(shares, shares[-1])  # rows of weight 0 may follow the last that can be drawn
    return torch.minimum(found, last)


def _packed(columns: Mapping[str, Tensor], device: torch.device) -> list[_Pack]:
    alike: dict[tuple[torch.dtype, torch.Size], list[str]] = {}
    for name, column in columns.items():
        alike.setdefault((column.dtype, column.shape), []).append(name)
    packs = []
    for names in alike.values():
        values = columns[names[0]] if len(names) == 1 else torch.stack([columns[name] for name in names], dim=1)
        packs.append(_Pack(tuple(names), values.to(device).contiguous()))
    return packs


def _take(values: Tensor, rows: Tensor | slice) -> Tensor:
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the torch device: ``"auto"`` is cuda if there is one, else cpu; cuda is that of this process on its machine.

    Raises
    ------
    DataError
        No such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        guess = near(str(device), ["auto", "cpu", "cuda"])
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise DataError(f"device: expected 'auto', 'cpu' or 'cuda', found {device!r}{hint}") from error
    if found.type == "cuda" and found.index is None and (place := launched()) is not None:
        found = torch.device("cuda", place["local"])
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {device!r}: torch finds no CUDA device here; use device='cpu' or device='auto'")
    return found


def epoch_order(seed: int, epoch: int, n_rows: int, device: torch.device) -> Tensor:
    """Return the order [n_rows] of a shuffling loader of this seed in an epoch."""
    generator = torch.Generator(device=device).manual_seed(_mix(seed, epoch))
    return torch.randperm(n_rows, generator=generator, device=device)


def _mix(seed: int, epoch: int) -> int:
    """Hash ``(seed, epoch)`` to 63 bits (splitmix64), so that neighbouring seeds and epochs share no order."""
    z = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
