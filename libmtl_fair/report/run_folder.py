"""A finished run as the report reads it: checked once, with a clear error for what is missing or damaged; its numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.spec import words
from libmtl_fair.errors import CheckpointError, DamagedFileError, FairMTLError, RecipeError
from libmtl_fair.files import Json, edited_files, file_digest, is_sealed, read_json, say_once
from libmtl_fair.recipe.yaml_source import read_yaml

_BASE_RATE = "_base_rate"
_SPLIT_PARTS: dict[str, type] = {"utility": dict, "audit": list, "groups": list, "shrinkage": list}
_SPLIT_PARTS |= {f"utility{_BASE_RATE}": dict, f"groups{_BASE_RATE}": list}
Made = TypeVar("Made")
P = ParamSpec("P")
_FRAMES: Mapping[str, tuple[list[str], list[str], list[str]]] = {
    "utility": (["task", "metric"], ["value"], []),
    "audit": (["delta_name"], ["delta", "bias", "violation_rate", "exact_bias"], ["exact"]),
    "pairs": (["delta_name", "task_a", "task_b"], ["bias", "violation_rate", "delta"], []),
    "shrinkage": (["delta_name"], ["a", "bias", "brier", "bias_slope", "brier_slope"], []),
    "groups": (["task", "attribute", "metric", "group", "flag"], ["value", "n", "low", "high"], []),
    "consistency": (["task", "metric"], ["value", "low", "high"], []),
    "constraint": (
        ["task", "attribute", "target", "threshold"],
        [*words("tolerance plain eta eta_bound train train_error train_selected val val_error val_selected")],
        ["train_met", "val_met", "at_bound", "out_of_reach"],
    ),
}
"""The texts, the numbers and what else each table has; ``pairs`` is the audit by task pair."""
_TEXTS = {"layer": str, "kind": str, "task_a": str, "task_b": str}


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """One method trained with one seed: its folder and what ``metrics.json`` says; a damaged file is a CheckpointError.

    ``again`` names the splits whose saved predictions are not those that were measured: the numbers were then taken again, from them.
    """

    method: str
    seed: int
    folder: Path
    metrics: Json
    again: tuple[str, ...] = ()

    def entries(self, part: str, split: str) -> list[Json]:
        """Return the rows of a table, see :meth:`RunFolder.frame`, as the file has them."""
        if part == "pairs":
            audits = self.entries("audit", split)
            return [{**pair, "delta_name": e["delta_name"]} for e in audits for pair in e.get("per_pair") or []]
        if part == "constraint":
            return list(self.metrics.get(part) or [])
        found = (self.metrics.get(part) or {}).get(split) or []
        if part == "consistency":
            return list(self.people(split).get("rows") or [])
        if part.startswith("utility"):
            return [{"task": t, "metric": m, "value": v} for t, each in dict(found).items() for m, v in each.items()]
        return list(found)

    def native_error(self, split: str) -> float:
        """Return the mean squared error of the audit scores, mean over tasks; NaN where an older run did not record it."""
        return number((self.metrics.get("native_error") or {}).get(split))

    def people(self, split: str) -> Json:
        """Return what an audit of people found (reference, rows, split, worst_pairs, protocol); empty where there was none."""
        found = (self.metrics.get("consistency") or {}).get(split) or {}
        named = found if isinstance(found, dict) else {"rows": found}
        listed = [named.get(name) or [] for name in ("rows", "split", "worst_pairs")]
        if found is not named or not all(
            isinstance(each, list) and all(isinstance(r, dict) for r in each) for each in listed
        ):
            file = self.folder / "metrics.json"
            raise CheckpointError(
                f"{file} is damaged: consistency.{split} is not what a run writes; run again with --resume to make it anew"
            )
        return named

    def thresholds(self, split: str) -> NDArray[np.float64] | None:
        """Return the method's own thresholds [T, T], NaN where it has none; None if not recorded."""
        found = ((self.metrics.get("drift") or {}).get(split) or {}).get("induced")
        return None if found is None else np.array(found, dtype=float)

    def history(self) -> pd.DataFrame | None:
        """Return the training history, or None if none was kept."""
        path = self.folder / "history.csv"
        frame = _table(path)
        for name, column in () if frame is None else frame.items():
            if not pd.api.types.is_numeric_dtype(column):
                wrong = next(
                    i
                    for i, value in enumerate(column, 2)
                    if not isinstance(value, int | float) and not _is_number(value)
                )
                raise CheckpointError(
                    f"{path}:{wrong} is damaged: column {name!r} holds {column.iloc[wrong - 2]!r}, expected a number"
                )
        return frame

    def structure(self) -> Json | None:
        """Return the branches of a branching model, ``{"last": ..., "chosen": ...}``, or None for any other model."""
        path = self.folder / "structure.json"
        return _mapping(path) if path.exists() else None

    def conflicts(self) -> pd.DataFrame | None:
        """Return epoch, layer, kind, task_a, task_b, cosine, angle of the tasks' gradients; None if not recorded."""
        path = self.folder / "conflicts.csv"
        frame = _table(path)
        if frame is not None and not {"epoch", "layer", "kind", "cosine", "angle"} <= set(frame.columns):
            raise CheckpointError(
                f"{path} is damaged: columns {list(frame.columns)}; run again with --resume to make it anew"
            )
        return frame


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run: recipe, cards, and every method and seed, in the recipe's order; ``on`` is the split that was asked for.

    ``edited`` names the files that are not as the run wrote them.
    """

    path: Path
    recipe: Json
    data_card: Json
    protocol: Json
    environment: Json
    runs: tuple[SeedRun, ...]
    on: str = ""
    edited: tuple[str, ...] = ()
    _held: dict[str, object] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what ``make`` makes, made once for this object under this name."""
        if name not in self._held:
            self._held[name] = make()
        return cast("Made", self._held[name])

    @property
    def methods(self) -> list[str]:
        """Names of the methods; the first is the reference."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def reference(self) -> str:
        """The method that differences refer to."""
        return self.methods[0]

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return sorted({run.seed for run in self.runs})

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.recipe.get("name") or self.path.name)

    @property
    def split(self) -> str:
        """The split to report: the one asked for; else test where it was recorded, else validation."""
        tested = any(run.metrics["utility"].get("test") for run in self.runs)
        return self.on or ("test" if tested else "val")

    def of(self, method: str) -> list[SeedRun]:
        """Return the runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]

    def frame(self, part: str) -> pd.DataFrame:
        """Return a table of the split: method, seed, then texts ("" where missing) and numbers (NaN where missing).

        ``utility`` (task ``macro`` too), ``audit``, ``pairs`` (the audit by task pair), ``shrinkage`` (the envelope of the
        shrunk reference), ``groups`` or ``consistency`` (of people; task ``macro``: mean over tasks); ``utility_base_rate`` and
        ``groups_base_rate`` are of the decisions that select as many as are positive on validation data (none in runs of earlier
        versions); ``constraint``: what a method was asked to keep, of training and validation decisions.
        """
        texts, numbers, plain = _FRAMES[part.removesuffix(_BASE_RATE)]
        found = [
            [item.method, item.seed, *(str(row.get(k) or "") for k in texts), *(number(row.get(k)) for k in numbers)]
            + [row.get(k) for k in plain]
            for item in self.runs
            for row in item.entries(part, self.split)
        ]
        return pd.DataFrame(found, columns=["method", "seed", *texts, *numbers, *plain])


def number(value: object) -> float:
    """A float; what is missing or no number is NaN.

    >>> number(None), number("x"), number(2)
    (nan, nan, 2.0)
    """
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


class Row(Protocol):
    """A row of a frame as a named tuple, whose fields are of any type."""

    def __getattr__(self, name: str) -> Any:
        """Return a field."""


def rows(frame: pd.DataFrame) -> Iterator[Row]:
    """Rows of a frame as named tuples."""
    yield from frame.itertuples(index=False)


def read_run(path: str | Path) -> RunFolder:
    """Read a run folder.

    Optional parts (data card, protocol, environment, history) may be absent; the recipe and every ``metrics.json`` that
    it promises may not. Where a file of predictions is no longer the one that was measured, its method and seed are measured again
    (:attr:`SeedRun.again`).

    Raises
    ------
    CheckpointError
        No such folder, no recipe, a method and seed without metrics, or a damaged file: it says which.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no run folder: no such directory. Give the folder that 'libmtl-fair run' made"
        )
    try:
        recipe = _checked(path / "recipe.yaml", read_yaml(path / "recipe.yaml").data)
    except RecipeError as error:
        raise CheckpointError(f"not a readable run folder: {error}") from error
    each = {(file.parent.parent.name, file.parent.name): file for file in sorted(path.glob("*/seed*/metrics.json"))}
    found = {(method, int(seed[4:])): file for (method, seed), file in each.items() if seed[4:].isdecimal()}
    methods = list(recipe["methods"]) if isinstance(recipe.get("methods"), dict) else sorted({m for m, _ in found})
    seeds = recipe["seeds"] if isinstance(recipe.get("seeds"), list) else sorted({s for _, s in found})
    wanted = [(method, seed) for method in methods for seed in seeds]
    missing = [f"{method}/seed{seed}/metrics.json" for method, seed in wanted if (method, seed) not in found]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise CheckpointError(f"{path} is incomplete: missing {shown}. Finish it with 'libmtl-fair run --resume'")
    if not wanted:
        raise CheckpointError(f"{path} holds no results: expected METHOD/seedK/metrics.json")
    runs = tuple(_seed_run(method, seed, found[method, seed]) for method, seed in wanted)
    files = (path / f"{name}.json" for name in ("data_card", "audit_protocol", "environment"))
    card, protocol, environment = (_mapping(file) if file.exists() else {} for file in files)
    present = tuple(_present(recipe, protocol, run) for run in runs)
    if edited := tuple(edited_files(path)):
        say_once(f"{path}: {not_as_written(edited)}")
    return RunFolder(path, recipe, card, protocol, environment, present, edited=edited)


def not_as_written(names: Collection[str]) -> str:
    """Say which files of a run are not what it wrote."""
    shown = ", ".join(sorted(names)[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (
        f"Not as the run wrote them, edited or damaged: {shown}. What is said here of what they hold may be wrong; "
        "'libmtl-fair run ... --resume' makes them anew, but for history.csv and run.json."
    )


_BY_DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def damage_named(function: Callable[P, Made]) -> Callable[P, Made]:
    """Let an error in what a run folder holds name the file that no longer is what the run wrote, if there is one.

    The first argument is a run folder's path, a RunFolder, or what has one as ``run``.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Made:
        try:
            return function(*args, **kwargs)
        except FairMTLError:
            raise
        except _BY_DAMAGE as error:
            run = getattr(args[0], "run", args[0])
            for file in sorted(Path(str(getattr(run, "path", run))).rglob("*.json")):
                try:
                    is_sealed(file)
                except DamagedFileError as damage:
                    what = f"{type(error).__name__}: {error}"
                    raise CheckpointError(
                        f"{damage}, and cannot be read as what it should be ({what}); run again with --resume to make it anew"
                    ) from error
            raise

    return wrapped


def _present(recipe: Json, protocol: Json, run: SeedRun) -> SeedRun:
    """Return the numbers of the predictions that are there now."""
    recorded = {p: d for p, d in (run.metrics.get("digest") or {}).items() if isinstance(d, dict)}
    files = {part: run.folder / f"predictions_{part}.parquet" for part in recorded}
    changed = [p for p, file in files.items() if file.exists() and file_digest(file) != recorded[p].get("file")]
    if not changed:
        return run
    from libmtl_fair.recipe.again import measured_again

    metrics = measured_again(recipe, protocol, run.folder, run.metrics, changed)
    return dataclasses.replace(run, metrics=metrics, again=tuple(changed))


def _mapping(path: Path) -> Json:
    return _checked(path, read_json(path))


def _checked(path: Path, value: object, where: str = "") -> Json:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a mapping{where}, found {type(value).__name__}")
    return value


def _seed_run(method: str, seed: int, file: Path) -> SeedRun:
    metrics = _mapping(file)
    for part in (*_SPLIT_PARTS, "settings", "checkpoint"):
        _checked(file, metrics.get(part) or {}, f" under {part!r}")
    if not metrics.get("utility"):
        raise CheckpointError(f"{file} is damaged: it has no 'utility'; run again with --resume to make it anew")
    for part, kind in _SPLIT_PARTS.items():
        for split, value in (metrics.get(part) or {}).items():
            inner = value.values() if isinstance(value, dict) else value
            if not isinstance(value, kind) or not all(isinstance(row, dict) for row in inner):
                raise CheckpointError(
                    f"{file} is damaged: {part}.{split} is not what a run writes; run again with --resume to make it anew"
                )
    return SeedRun(method, seed, file.parent, metrics)


def _table(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_csv(path, dtype=_TEXTS, keep_default_na=False, na_values=[""]) if path.exists() else None
    except pd.errors.EmptyDataError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run again with --resume to make it anew") from error
