"""Reading new rows for a trained model: its inputs, and groups where there are any, by what training found; as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.data.features import MISSING_CATEGORY, FeatureEncoder
from libmtl_fair.data.frames import Series, Values, as_text, ids_of, is_date, is_numeric
from libmtl_fair.data.selection import Table
from libmtl_fair.data.sensitive import known_groups
from libmtl_fair.data.spec import SensitiveSpec, Transform, make_spec
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.tasks import Regression, Task, task_from_dict, task_to_dict
from libmtl_fair.validation import MissingRule

_MOST_SHOWN = 5


@dataclass(frozen=True)
class NewRows:
    """What training found of a table, and a model needs of any other: it holds no row of it.

    Attributes
    ----------
    encoder : FeatureEncoder
        The fitted encoding of the inputs.
    tasks : tuple of Task
        With names of classes and labels, and the scale of regressions.
    groups : dict of str to list of str
        Attribute -> names of its groups, index = id.
    sensitive : dict of str to SensitiveSpec
        How groups are read off columns: the attributes and, for intersections, their parts.
    missing : str
        The rule for rows without a sensitive value: "drop", "group" or "error".
    transforms : dict of str to str
        Regression -> "log" or "log1p", where its labels are of that.
    missing_values : tuple of str
        Words that were missing values in text columns, too.
    dates : dict of str to str
        Numeric input -> "date" or "duration", where it is the days of that.
    read_shape : tuple of int
        Of one input, where inputs are no columns but read from files; else empty.
    """

    encoder: FeatureEncoder
    tasks: tuple[Task, ...]
    groups: dict[str, list[str]]
    sensitive: Mapping[str, SensitiveSpec]
    missing: MissingRule = "drop"
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    missing_values: tuple[str, ...] = ()
    dates: Mapping[str, str] = field(default_factory=dict)
    read_shape: tuple[int, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        return self.read_shape or (self.n_features,)

    @property
    def n_features(self) -> int:
        """Return the width of the encoded inputs."""
        return len(self.encoder.names)

    def encode(self, frame: pd.DataFrame) -> Tensor:
        """Return the inputs of new rows, float32 [N, F].

        Raises
        ------
        DataError
            The table lacks input columns (all are named), or holds values that do not fit theirs; or inputs are no columns.
        """
        if self.read_shape:
            raise DataError(
                f"this model takes inputs of shape {list(self.read_shape)} that are read from files, and a table has none; use the "
                "network itself (export, or FairTrainer.predict with a loader of the files)"
            )
        self._need(self.encoder.kinds, frame, "inputs of the model")
        return torch.from_numpy(self.encoder.encode(frame.assign(**self._numbers(frame))))

    def _numbers(self, frame: pd.DataFrame) -> dict[str, Series]:
        """Return the columns of numbers and dates that a file holds as text or, with gaps, as objects; what reads as neither stays."""
        found = {}
        for name in (name for name, kind in self.encoder.kinds.items() if kind == "numeric"):
            series = frame[name]
            if not (is_numeric(series) or is_date(series)):
                read = _read(series, self.dates.get(name))
                if not (read.isna() & series.notna()).any():
                    found[name] = read
        return found

    def group_ids(self, frame: pd.DataFrame, needed: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the group ids of new rows, attribute -> int64 [N], -1 where unknown, of attributes whose columns are there.

        Raises
        ------
        DataError
            The columns of a ``needed`` attribute are not there; or values that are not numbers where these are binned.
        """
        found = {}
        for attribute, names in self.groups.items():
            spec = self.sensitive[attribute]
            columns = [str(self.sensitive[part].column) for part in spec.of or (attribute,)]
            if attribute in needed:
                self._need(
                    columns, frame, f"the groups of sensitive attribute {attribute!r}, which this method decides by"
                )
            if set(columns) <= set(frame.columns):
                ids = known_groups(attribute, self.sensitive, names, frame, self.missing)
                found[attribute] = torch.from_numpy(ids)
        return found

    def notes(self, frame: pd.DataFrame) -> list[str]:
        """Return what the encoding meets in new rows and did not in training: one sentence a column."""
        found, encoder = [], self.encoder
        numeric, texts = ([n for n, kind in encoder.kinds.items() if kind == k] for k in ("numeric", "categorical"))
        for name, known, rare in zip(texts, encoder.categories, encoder.rare):
            text = as_text(frame[name])
            text = np.where(pd.isna(text), MISSING_CATEGORY, text)
            strange = Counter(text[ids_of(text, (*known, *rare)) < 0].tolist())
            if strange:
                shown = ", ".join(repr(value) for value, _ in strange.most_common(_MOST_SHOWN))
                found.append(
                    f"column {name!r}: {strange.total()} of {len(frame)} rows hold a category that training did not have ({shown}); "
                    "they count as none of the known ones"
                )
        for i, name in enumerate(numeric):
            gaps = int(frame[name].isna().sum())
            if gaps and i not in encoder.gaps:
                found.append(
                    f"column {name!r}: {gaps} of {len(frame)} rows have no value, which no row of training lacked; they take its "
                    f"median, {encoder.fill[i]:g}"
                )
        return found

    def native(self, task: Task, values: Values) -> NDArray[np.float64]:
        """Return a regression's values, in units of training, in those of its column."""
        assert isinstance(task, Regression)
        back = values.astype(np.float64) * task.std + task.mean
        transform = self.transforms.get(task.name)
        return np.asarray(back if transform is None else np.exp(back) if transform == "log" else np.expm1(back))

    def to_dict(self) -> Json:
        """Return plain values, for JSON."""
        return {
            "encoder": self.encoder.to_dict(),
            "tasks": [task_to_dict(task) for task in self.tasks],
            "groups": self.groups,
            "sensitive": {name: spec.model_dump(exclude_defaults=True) for name, spec in self.sensitive.items()},
            "missing": self.missing,
            "transforms": dict(self.transforms),
            "missing_values": list(self.missing_values),
            "dates": dict(self.dates),
            **({"read_shape": list(self.read_shape)} if self.read_shape else {}),
        }

    @classmethod
    def from_dict(cls, values: Json) -> NewRows:
        """Read what :meth:`to_dict` gave, from JSON too; values that do not fit are a KeyError, TypeError or ValueError."""
        if values["missing"] not in get_args(MissingRule):
            raise DataError(unknown("rule for missing groups", values["missing"], get_args(MissingRule)))
        sensitive = {
            name: make_spec(SensitiveSpec, item, "sensitive attribute", name)
            for name, item in values["sensitive"].items()
        }
        return cls(
            FeatureEncoder.from_dict(values["encoder"]),
            tuple(task_from_dict(entry) for entry in values["tasks"]),
            {str(name): [str(group) for group in names] for name, names in values["groups"].items()},
            sensitive,
            values["missing"],
            dict(values["transforms"]),
            tuple(values.get("missing_values", ())),
            dict(values.get("dates") or {}),
            tuple(map(int, values.get("read_shape") or ())),
        )

    @staticmethod
    def _need(columns: Sequence[str] | Mapping[str, object], frame: pd.DataFrame, what: str) -> None:
        lacking = [name for name in columns if name not in frame.columns]
        if lacking:
            several = "s" * (len(lacking) > 1)
            raise DataError(
                f"the table lacks the column{several} {', '.join(map(repr, lacking))} ({what}); it has: "
                f"{', '.join(map(str, frame.columns))}. Name the columns as in the training table"
            )


def _read(series: Series, what: str | None) -> Series:
    """Return a column as dates, durations or (None) numbers, missing where a value is none."""
    if what == "date":
        return pd.to_datetime(series, errors="coerce", format="ISO8601")
    return pd.to_timedelta(series, errors="coerce") if what else pd.to_numeric(series, errors="coerce")


def fit_new_rows(table: Table, encoder: FeatureEncoder, tasks: tuple[Task, ...]) -> NewRows:
    """Return how new rows are read for a model that is trained on ``table``."""
    known = table.known
    chosen = {item.attribute: item.spec for item in table.groups}
    parts = {part: known[part] for spec in chosen.values() for part in spec.of}
    transforms = {item.name: item.spec.transform for item in table.labels if item.spec.transform is not None}
    names = {item.attribute: list(item.names) for item in table.groups}
    words = table.spec.missing_values
    dated = {name: table.frame[name].dtype.kind for name in encoder.kinds if is_date(table.frame[name])}
    dates = {name: "date" if kind == "M" else "duration" for name, kind in dated.items()}
    return NewRows(encoder, tasks, names, parts | chosen, table.choice.missing, transforms, words, dates)
