"""Do validation and test agree? A retrained run's main numbers on both, and what drawing other people would change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libmtl_fair.predictions import Predictions

_FOLDS = 10


def agreement_table(folder: Path) -> Any:
    """Return a table of a run's main numbers on validation and on test data, side by side.

    After a mean stands the standard deviation over seeds; after the difference that of drawing other people
    (:func:`sampling_deviation`, of the first seed), where the run has kept its predictions.
    """
    from rich.table import Table

    from libmtl_fair.files import read_json

    title = "validation and test agree? (± over seeds; of the difference: over people)"
    table = Table("", "validation", "test", "test - validation", title=title, title_justify="left")
    for method in sorted({path.parent.parent.name for path in folder.glob("*/seed*/metrics.json")}):
        seeds = sorted((folder / method).glob("seed*"))
        held = [read_json(path / "metrics.json") for path in seeds]
        table.add_section()
        table.add_row(f"[bold]{method}")
        for name, (read, statistic) in _measures(held[0], folder).items():
            values = {part: [read(h, part) for h in held] for part in ("val", "test")}
            gap = _difference(values, _deviation(seeds[0], statistic))
            table.add_row(name, _spread(values["val"]), _spread(values["test"]), gap)
    return table


Read = Callable[[Mapping[str, Any], str], float | None]
Statistic = Callable[["Predictions"], float]


def _measures(held: Mapping[str, Any], folder: Path) -> dict[str, tuple[Read, Statistic]]:
    """Return label -> (how metrics.json says it, how it follows from predictions)."""
    from libmtl_fair.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    deltas = {str(entry["delta_name"]): float(entry["delta"]) for entry in held["audit"]["val"]}

    def statistic(name: str) -> Statistic:
        from libmtl_fair.tune.objectives import parse_measure, value_of

        def value(predictions: Predictions) -> float:
            kinds = {task.name: task.kind for task in predictions.tasks}
            measure = parse_measure(name, kinds, list(predictions.groups), list(deltas))
            return value_of(measure, predictions, deltas, recipe)

        return value

    found: dict[str, tuple[Read, Statistic]] = {}
    for name in held["utility"]["val"]["macro"]:
        found[f"macro {name}"] = (_reader(name), statistic(f"macro_{name}"))
    for i, entry in enumerate(held["audit"]["val"]):
        name = str(entry["delta_name"])
        found[f"bias@{name}"] = (lambda h, part, i=i: h["audit"][part][i]["bias"], statistic(f"bias@{name}"))  # type: ignore[misc]
    found["eo difference, worst"] = (_worst, statistic("eo_difference"))
    return found


def _reader(name: str) -> Read:
    return lambda held, part: held["utility"][part]["macro"].get(name)


def _worst(held: Mapping[str, Any], part: str) -> float | None:
    rows = held["groups"][part]
    found = [r["value"] for r in rows if r["metric"].startswith("equalized_odds") and r["group"] == "difference"]
    known = [value for value in found if value is not None and value == value]
    return max(known) if known else None


def _spread(values: list[float | None]) -> str:
    import numpy as np

    known = [v for v in values if v is not None]
    if not known:
        return ""
    return f"{np.mean(known):.4f}" + (f" ± {np.std(known, ddof=1):.4f}" if len(known) > 1 else "")


def _difference(values: Mapping[str, list[float | None]], deviation: float | None) -> str:
    pairs = [b - a for a, b in zip(values["val"], values["test"]) if a is not None and b is not None]
    if not pairs:
        return ""
    return f"{math.fsum(pairs) / len(pairs):+.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _deviation(seed: Path, statistic: Statistic) -> float | None:
    """Return the deviation of a difference between test and validation, two independent draws of people."""
    from libmtl_fair.errors import FairMTLError
    from libmtl_fair.predictions import Predictions

    paths = [seed / f"predictions_{part}.parquet" for part in ("val", "test")]
    if not all(path.exists() for path in paths):
        return None
    try:
        return math.hypot(*(sampling_deviation(Predictions.load(path), statistic) for path in paths))
    except FairMTLError:  # a measure that these tasks do not have
        return None


def sampling_deviation(predictions: Predictions, statistic: Statistic, folds: int = _FOLDS) -> float:
    """Return the standard deviation of a statistic over draws of people: the jackknife that leaves out a tenth at a time.

    ``sqrt((g - 1) / g sum_i (s_i - mean s)^2)`` for g folds of the rows in their own order, every g-th row in one fold.
    """
    import torch

    rows = torch.arange(len(predictions))
    left = [statistic(_part(predictions, rows % folds != fold)) for fold in range(folds)]
    mean = math.fsum(left) / folds
    return math.sqrt((folds - 1) / folds * math.fsum((value - mean) ** 2 for value in left))


def _part(predictions: Predictions, rows: Any) -> Predictions:
    import dataclasses

    def some(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value[rows] for name, value in values.items()}

    return dataclasses.replace(
        predictions,
        scores=some(predictions.scores),
        outputs=some(predictions.outputs),
        labels=some(predictions.labels),
        groups=some(predictions.groups),
        embeddings=None,
    )
