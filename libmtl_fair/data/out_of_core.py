"""Tables larger than memory: read by row group, prepared once into a cache on disk, of which a dataset is made.

Three looks at the file: what its columns of text spell, the statistics of the training rows, and the rows themselves, encoded and
written. What is decided by looking at people (which columns tell a group, medians, typical values) goes by a sample of
262,144 rows, and rows that have what no other row in it has: all rows, of a smaller table.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from libmtl_fair.data import cache
from libmtl_fair.data.card import Card, dataset_card, joined_cards, settled_card
from libmtl_fair.data.dataset import Dataset, Split, build_dataset
from libmtl_fair.data.expressions import expression_columns
from libmtl_fair.data.features import FeatureEncoder, Moments, Statistics, feature_kinds
from libmtl_fair.data.flips import Flip, Twins
from libmtl_fair.data.frames import column_of
from libmtl_fair.data.labels import RawLabels, raw_labels, regression_values, task_columns
from libmtl_fair.data.new_rows import NewRows
from libmtl_fair.data.parquet import Parquet, Words
from libmtl_fair.data.reference import Reference
from libmtl_fair.data.selection import PARTS, Choice, Table, choose_inputs, choose_tasks
from libmtl_fair.data.sensitive import Groups, cells, choose_sensitive, tell_tale_columns
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec
from libmtl_fair.data.tables import TAKEN
from libmtl_fair.errors import DataError
from libmtl_fair.files import plain
from libmtl_fair.tasks import Regression, Task

SAMPLE = 2**18
"""Rows of which what cannot be found by adding up is found."""
_MOST_VALUES, _MOST_SHOWN = 10_000, 300
_PART, _OUT = "(part)", 3
_VERSION = 1


@dataclass(frozen=True)
class Part:
    """Some rows that are in use: their ``frame``, positions in the source, and ``code``: train, val or test as 0, 1, 2."""

    frame: pd.DataFrame
    rows: NDArray[np.int64]
    code: NDArray[np.int64]

    def take(self, chosen: NDArray[Any]) -> Part:
        """Return some of the rows."""
        return Part(self.frame.iloc[chosen], self.rows[chosen], self.code[chosen])


@dataclass(frozen=True)
class Source:
    """A parquet table with what was chosen of it."""

    spec: TableSpec
    choice: Choice
    table: Parquet
    tasks: Mapping[str, TaskSpec]
    sensitive: Mapping[str, SensitiveSpec]
    known: Mapping[str, SensitiveSpec]
    words: Words

    @classmethod
    def of(cls, spec: TableSpec, table: Parquet, choice: Choice) -> Source:
        """Read what the columns of text spell."""
        tasks = choose_tasks(spec, choice.tasks)
        chosen = spec.default_sensitive if choice.sensitive is None else choice.sensitive
        sensitive, known = choose_sensitive(chosen, spec.sensitive, choice.keep_groups)
        made = cls(spec, choice, table, tasks, sensitive, known, Words({}, {}))
        return replace(made, words=table.words(made.columns, spec.missing_values))

    @property
    def tell_tale(self) -> dict[str, set[str]]:
        """Return attribute -> the columns that show it."""
        return {name: tell_tale_columns(item, self.known) for name, item in self.sensitive.items()}

    @property
    def inputs(self) -> list[str]:
        """Return the input columns."""
        shown: set[str] = set() if self.choice.sensitive_inputs else set().union(*self.tell_tale.values())
        return choose_inputs(self.spec, self.tasks, shown)

    @property
    def columns(self) -> list[str]:
        """Return the columns that have to be read."""
        labels = [column for task in self.tasks.values() for column in task_columns(task)]
        groups = [
            column
            for item in self.sensitive.values()
            for part in item.of or ("",)
            for column in [self._column(item, part)]
        ]
        filtered = expression_columns(self.spec.filter) if self.spec.filter else ()
        split = (self.choice.split,) if isinstance(self.choice.split, str) else ()
        return list(dict.fromkeys([*self.inputs, *labels, *groups, *filtered, *split]))

    def _column(self, item: SensitiveSpec, part: str) -> str:
        return str((self.known[part] if part else item).column)

    def parts(self) -> Iterator[Part]:
        """Yield the rows in use, in order."""
        first, share = 0, self.choice.subset
        share = share / self.table.n_rows if isinstance(share, int) else share
        for frame in self.table.parts(self.columns, self.words):
            rows = np.arange(first, first + len(frame))
            first += len(frame)
            code = self._codes(frame, rows)
            if self.spec.keep_rows is not None:
                code[~self.spec.keep_rows(frame).to_numpy(dtype=bool, na_value=False)] = _OUT
            if share is not None and share < 1:
                code[draws(rows, self.choice.of_test, 1) >= share] = _OUT
            kept = np.flatnonzero(code != _OUT)
            if len(kept):
                yield Part(frame.iloc[kept].reset_index(drop=True), rows[kept], code[kept])

    def _codes(self, frame: pd.DataFrame, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        split = self.choice.split
        if isinstance(split, str):
            column = column_of(frame, split, "split").astype(object)
            wrong = sorted({str(value) for value in column.dropna()} - set(PARTS))
            if wrong:
                raise DataError(f"split column {split!r}: expected 'train', 'val' and 'test', found {wrong[0]!r}")
            return np.array(column.map({part: i for i, part in enumerate(PARTS)}).fillna(_OUT), dtype=np.int64)
        shares = tuple(split)
        if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise DataError(f"split must be three shares above 0 that sum to 1 (train, val, test), found {shares}")
        held = draws(rows, self.choice.of_test, 2) >= shares[0] + shares[1]
        other = draws(rows, self.choice.seed, 3) >= shares[0] / (shares[0] + shares[1])
        return np.where(held, 2, other.astype(np.int64))


def draws(rows: NDArray[np.int64], seed: int, turn: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each row, which depends on its place, the seed and the turn alone (splitmix64)."""
    start = (seed * 0xD1B54A32D192ED03 + turn * 0x632BE59BD9B4E019) % 2**64
    with np.errstate(over="ignore"):
        z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53)


class Sample:
    """At most so many rows, drawn by their places, and the first of each value, in each part, of labels and groups."""

    def __init__(self, source: Source, most: int) -> None:
        self._source, self._most, self._seen = source, most, dict[str, set[tuple[object, int]]]()
        self._held: list[Part] = []
        self._first: list[Part] = []
        self._limit, self.n_rows = 1.0, 0

    def add(self, part: Part) -> None:
        """Take rows in."""
        self.n_rows += len(part.rows)
        self._held.append(part.take(draws(part.rows, 0, 4) < self._limit))
        if sum(len(each.rows) for each in self._held) > 2 * self._most:
            self._held = [self._smallest()]
        self._first.append(part.take(self._new(part)))

    def _smallest(self) -> Part:
        whole = _together(self._held)
        drawn = draws(whole.rows, 0, 4)
        if len(drawn) > self._most:
            self._limit = float(np.partition(drawn, self._most)[self._most])
        return whole.take(drawn < self._limit)

    def _new(self, part: Part) -> NDArray[np.int64]:
        """Return which rows have a value that none before had in their part."""
        source, new = self._source, set[int]()
        values: dict[str, Any] = {
            name: cells(name, {**source.known, **source.sensitive}, part.frame) for name in source.sensitive
        }
        columns = {column for task in source.tasks.values() for column in task_columns(task)}
        values |= {f"\0{column}": column_of(part.frame, column, "tasks") for column in columns}
        for name, given in values.items():
            seen = self._seen.setdefault(name, set())
            if len(seen) < _MOST_VALUES:
                codes, found = pd.factorize(given)
                keys, first = np.unique(codes * len(PARTS) + part.code, return_index=True)
                for at, code in zip(first.tolist(), (keys // len(PARTS)).tolist()):
                    key = (None if code < 0 else found[code], int(part.code[at]))
                    if key not in seen:
                        seen.add(key)
                        new.add(at)
        return np.array(sorted(new), dtype=np.int64)

    def taken(self) -> tuple[Part, bool]:
        """Return the rows in order, and whether these are all."""
        whole = _together([self._smallest(), *self._first])
        _, at = np.unique(whole.rows, return_index=True)
        found = whole.take(at)
        return replace(found, frame=found.frame.reset_index(drop=True)), len(at) == self.n_rows


def _together(parts: Sequence[Part]) -> Part:
    frames = [part.frame for part in parts if len(part.frame)]
    if not frames:
        raise DataError("no row is left after the filter (where) and the split")
    return Part(
        pd.concat(frames, ignore_index=True),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.code for part in parts]),
    )


def load_on_disk(
    spec: TableSpec, table: Parquet, choice: Choice, folder: str | Path | None, sample: int = SAMPLE
) -> Dataset:
    """Return the dataset of a parquet table, from its cache; made where there is none for this choice and these files.

    Parameters
    ----------
    folder : str or Path, optional
        Where caches are; None: ``<path of the table>.libmtl_fair`` beside it.
    sample : int
        Rows of the sample.
    """
    declared: dict[str, Any] = {name: value for name, value in vars(spec).items() if name != "keep_rows"}
    declared |= {name: {k: v.model_dump() for k, v in declared[name].items()} for name in ("tasks", "sensitive")}
    request = cache.key(_VERSION, sample, declared, asdict(choice))
    place = (Path(folder) if folder else table.path.with_name(f"{table.path.name}.libmtl_fair")) / request

    held = cache.ready(place, table.digest, lambda writer: _prepare(Source.of(spec, table, choice), writer, sample))
    return _opened(spec.name, place, held)


def _prepare(source: Source, writer: cache.Writer, most: int) -> dict[str, Any]:
    """Write the arrays of the cache; return what is told beside them."""
    sample, statistics, scales = (
        Sample(source, most),
        None,
        {n: Moments(1) for n, t in source.tasks.items() if t.kind == "regression"},
    )
    for part in source.parts():
        if statistics is None:
            statistics = Statistics(feature_kinds(part.frame, source.inputs, source.spec.kinds))
        training = part.frame[part.code == 0]
        statistics.add(training)
        for name, moments in scales.items():
            task = source.tasks[name]
            moments.add(regression_values(task, training[str(task.column)], f"task {name!r} (regression)")[:, None])
        sample.add(part)
    if statistics is None:
        raise DataError(f"{source.table.path}: no row is left after the filter (where) and the split")
    taken, complete = sample.taken()
    made = _fitted(source, taken, None if complete else statistics)
    if not complete:
        made = replace(made, tasks=tuple(_scaled(task, source.tasks, scales) for task in made.tasks))
        made = replace(made, new_rows=replace(made.new_rows, tasks=made.tasks))
    return _described(made, _write(source, taken.frame, made, writer, sample.n_rows if complete else most))


def _fitted(source: Source, sample: Part, statistics: Statistics | None) -> Dataset:
    """Return the dataset of the sample, encoded by the statistics of all training rows."""
    spec = replace(source.spec, keep_rows=None, stratify="")
    choice = replace(source.choice, split=_PART, subset=None)
    frame = sample.frame.assign(**{_PART: np.array(PARTS, dtype=object)[sample.code]})
    frame.attrs[TAKEN] = source.words.taken
    encoder: FeatureEncoder | None = None
    if statistics is not None:
        training = sample.frame[sample.code == 0]
        encoder = statistics.encoder(training, choice.min_frequency, choice.max_categories)
    return build_dataset(spec, frame, choice, encoder)


def _scaled(task: Task, specs: Mapping[str, TaskSpec], scales: Mapping[str, Moments]) -> Task:
    if not isinstance(task, Regression) or not specs[task.name].standardise:
        return task
    found = scales[task.name]
    return replace(task, mean=float(found.mean[0]), std=float(found.deviation[0]))


def _write(source: Source, sample: pd.DataFrame, made: Dataset, writer: cache.Writer, shown: int) -> Card:
    """Write inputs, labels, groups and places of all rows, part by part; return their card."""
    columns = list(dict.fromkeys(column for task in source.tasks.values() for column in task_columns(task)))
    witness = pd.concat(
        [sample[columns].drop_duplicates(name).head(_MOST_SHOWN) for name in columns], ignore_index=True
    )
    card: Card | None = None
    for each in source.parts():
        x, ids = made.encoder.encode(each.frame), made.new_rows.group_ids(each.frame)
        both = pd.concat([witness, each.frame[columns]], ignore_index=True)
        labels = [raw_labels(name, task, both) for name, task in source.tasks.items()]
        labels = [replace(item, values=item.values[len(witness) :]) for item in labels]
        groups = [_groups(source, made, name, each.frame, ids[name].numpy()) for name in source.sensitive]
        arrays: dict[str, NDArray[Any]] = {"x": x, "rows": each.rows}
        arrays |= {f"label{i}": _final(task, item) for i, (task, item) in enumerate(zip(made.tasks, labels))}
        arrays |= {f"group{i}": item.ids for i, item in enumerate(groups)}
        parts = {part: np.flatnonzero(each.code == code) for code, part in enumerate(PARTS)}
        for part, rows in parts.items():
            for name, values in arrays.items():
                writer.add(f"{part}.{name}", values[rows])
        table = Table(
            source.spec, source.choice, each.frame, each.rows, tuple(labels), tuple(groups), "", None, source.tell_tale, source.known
        )  # fmt: skip
        found = dataset_card(table, each.frame, parts, made.encoder)
        card = found if card is None else joined_cards(card, found)
    assert card is not None
    card |= {"rows_in_source": source.table.n_rows, "taken_as_missing": source.words.taken}
    notes = [] if shown >= card["rows"] else [
        f"read out of core: medians, and which columns tell a group, are those of {shown:,} rows drawn at random"
    ]  # fmt: skip
    return settled_card(card, [*source.spec.notes, *notes])


def _groups(source: Source, made: Dataset, name: str, frame: pd.DataFrame, ids: NDArray[np.int64]) -> Groups:
    gap = pd.isna(cells(name, {**source.known, **source.sensitive}, frame))
    if gap.any() and source.choice.missing == "error":
        raise DataError(
            f"sensitive attribute {name!r}: {int(gap.sum())} values are missing; use missing='drop' or missing='group'"
        )
    return Groups(name, source.sensitive[name], ids, tuple(made.groups[name]), gap)


def _final(task: Task, labels: RawLabels) -> NDArray[Any]:
    if not isinstance(task, Regression):
        return labels.values
    return np.asarray((labels.values - task.mean) / task.std, dtype=np.float32)


def _described(made: Dataset, card: Card) -> dict[str, Any]:
    """Return, as plain values, what :func:`_opened` makes a dataset of."""
    twins = made.train.twins
    return {
        "new_rows": made.new_rows.to_dict(),
        "card": card,
        "tell_tale": {name: list(columns) for name, columns in made.tell_tale.items()},
        "reference": None if made.reference is None else asdict(made.reference),
        "twins": None if twins is None else [plain(vars(flip)) for flip in twins.flips],
    }


def _opened(name: str, place: Path, held: Mapping[str, Any]) -> Dataset:
    """Return the dataset that a cache holds."""
    rows, reference = NewRows.from_dict(held["new_rows"]), held["reference"]
    if reference is not None:
        of = {key: tuple(reference[key]) for key in ("columns", "factors", "inputs")}
        reference = Reference(left_out=reference["left_out"], **of)
    flips = tuple(
        Flip(f["attribute"], torch.tensor(f["columns"]), torch.tensor(f["values"]), torch.tensor(f["place"]))
        for f in held["twins"] or ()
    )
    splits = {}
    for part in PARTS:
        found: dict[str, torch.Tensor] = {}
        maps: list[mmap.mmap] = []
        for key, about in held["arrays"].items():
            if key.startswith(f"{part}."):
                tensor, opened = cache.mapped(place, key, about)
                found[key.removeprefix(f"{part}.")], maps = tensor, [*maps, *opened]
        if "x" not in found or not len(found["x"]):
            raise DataError(f"dataset {name!r}: the {part} split is empty; give it rows")
        splits[part] = Split(
            x=found["x"],
            labels={task.name: found[f"label{i}"] for i, task in enumerate(rows.tasks)},
            groups={attribute: found[f"group{i}"] for i, attribute in enumerate(rows.groups)},
            rows=found["rows"],
            group_names=rows.groups,
            feature_names=rows.encoder.names,
            reference=reference,
            twins=Twins(flips) if flips else None,
            maps=tuple(maps),
        )
    return Dataset(
        name=name,
        **splits,
        tasks=rows.tasks,
        groups=rows.groups,
        feature_names=rows.encoder.names,
        card=held["card"],
        new_rows=rows,
        tell_tale={attribute: tuple(columns) for attribute, columns in held["tell_tale"].items()},
        prepared=(place, held["source"]),
    )
