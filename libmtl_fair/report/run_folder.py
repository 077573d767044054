"""A finished run as the report reads it: checked once, with a clear error for what is missing or damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import read_json
from libmtl_fair.recipe.yaml_source import read_yaml

_CARDS = ("data_card", "audit_protocol", "environment")
_SPLIT_PARTS: dict[str, type] = {"utility": dict, "audit": list, "groups": list, "shrinkage": list}


@dataclass(frozen=True)
class SeedRun:
    """One method trained with one seed: its folder and what ``metrics.json`` says."""

    method: str
    seed: int
    folder: Path
    metrics: dict[str, Any]

    def part(self, name: str, split: str) -> Any:
        """Return one part of the metrics for a split (None if it was not recorded)."""
        return (self.metrics.get(name) or {}).get(split)

    def history(self) -> pd.DataFrame | None:
        """Return the training history, or None if none was kept.

        Raises
        ------
        CheckpointError : ``history.csv`` is damaged.
        """
        return _table(self.folder / "history.csv")

    def structure(self) -> dict[str, Any] | None:
        """Return the branches of a branching model, ``{"last": ..., "chosen": ...}``, or None for any other model.

        Raises
        ------
        CheckpointError : ``structure.json`` is damaged.
        """
        path = self.folder / "structure.json"
        return _mapping(path) if path.exists() else None

    def conflicts(self) -> pd.DataFrame | None:
        """Return epoch, layer, kind, task_a, task_b, cosine, angle of the tasks' gradients; None if not recorded.

        Raises
        ------
        CheckpointError : ``conflicts.csv`` is damaged.
        """
        path = self.folder / "conflicts.csv"
        frame = _table(path, {"layer": str, "kind": str, "task_a": str, "task_b": str})
        if frame is not None and not {"epoch", "layer", "kind", "cosine", "angle"} <= set(frame.columns):
            raise CheckpointError(f"{path} is damaged: columns {list(frame.columns)}; run again to make it anew")
        return frame


@dataclass(frozen=True)
class RunFolder:
    """A run: recipe, cards, and every method and seed, in the recipe's order."""

    path: Path
    recipe: dict[str, Any]
    data_card: dict[str, Any]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    runs: tuple[SeedRun, ...]

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
        """The split to report: test where it was recorded, else validation."""
        return "test" if any(run.part("utility", "test") for run in self.runs) else "val"

    def of(self, method: str) -> list[SeedRun]:
        """Return the runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]


def read_run(path: str | Path) -> RunFolder:
    """Read a run folder.

    Optional parts (data card, protocol, environment, history) may be absent; the recipe and every ``metrics.json`` that
    it promises may not.

    Raises
    ------
    CheckpointError : no such folder, no recipe, a method and seed without metrics, or a damaged file: it says which.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no run folder: no such directory. Give the folder that 'libmtl-fair run' made"
        )
    recipe = _recipe(path / "recipe.yaml")
    found = _found(path)
    methods = list(recipe["methods"]) if isinstance(recipe.get("methods"), dict) else sorted({m for m, _ in found})
    seeds = recipe["seeds"] if isinstance(recipe.get("seeds"), list) else sorted({s for _, s in found})
    wanted = [(method, seed) for method in methods for seed in seeds]
    missing = [f"{method}/seed{seed}/metrics.json" for method, seed in wanted if (method, seed) not in found]
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise CheckpointError(f"{path} is incomplete: missing {shown}. Finish it with 'libmtl-fair run --resume'")
    if not wanted:
        raise CheckpointError(f"{path} holds no results: expected METHOD/seedK/metrics.json")
    runs = tuple(_seed_run(method, seed, found[(method, seed)]) for method, seed in wanted)
    card, protocol, environment = (_optional(path / f"{name}.json") for name in _CARDS)
    return RunFolder(path, recipe, card, protocol, environment, runs)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path).data
    except RecipeError as error:
        raise CheckpointError(f"not a readable run folder: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: expected a mapping, found {type(data).__name__}")
    return data


def _found(path: Path) -> dict[tuple[str, int], Path]:
    found: dict[tuple[str, int], Path] = {}
    for file in sorted(path.glob("*/seed*/metrics.json")):
        seed = file.parent.name.removeprefix("seed")
        if seed.isdecimal():
            found[(file.parent.parent.name, int(seed))] = file
    return found


def _seed_run(method: str, seed: int, file: Path) -> SeedRun:
    metrics = _mapping(file)
    for part in (*_SPLIT_PARTS, "settings", "checkpoint"):
        value = metrics.get(part)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{file} is damaged: expected a mapping under {part!r}, found {type(value).__name__}")
    if not metrics.get("utility"):
        raise CheckpointError(f"{file} is damaged: it has no 'utility'; run again to make it anew")
    for part, kind in _SPLIT_PARTS.items():
        for split, value in (metrics.get(part) or {}).items():
            _check_rows(file, f"{part}.{split}", value, kind)
    return SeedRun(method, seed, file.parent, metrics)


def _check_rows(file: Path, where: str, value: Any, kind: type) -> None:
    rows = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(row, Mapping) for row in rows):
        raise CheckpointError(f"{file} is damaged: {where} is not what a run writes; run again to make it anew")


def _table(path: Path, types: Mapping[str, type] | None = None) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        return pd.read_csv(path, dtype=dict(types or {}), keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); run again to make it anew") from error


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a mapping, found {type(value).__name__}")
    return value


def _optional(path: Path) -> dict[str, Any]:
    return _mapping(path) if path.exists() else {}
