"""What is measured of one trained method and seed: utility, audit, shrinkage curve, group metrics, drift."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from libmtl_fair import metrics
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.metrics.sampling import draw_pool
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Audit
from libmtl_fair.tasks import Regression, Task


@dataclass(frozen=True)
class Protocol:
    """The fixed tolerances and score ranges of a run, chosen once from the reference model's validation data.

    Attributes
    ----------
    deltas : name as the recipe spells it -> tolerance in [0, 1].
    score_ranges : regression task -> (q10, q90) of the reference's validation outputs, standardised units.
    about : where they come from, as the report states it.
    """

    deltas: dict[str, float]
    score_ranges: dict[str, tuple[float, float]]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def choose(cls, recipe: Recipe, method: str, seed: int, predictions: Predictions) -> Protocol:
        """Choose tolerances and score ranges from the reference model's validation predictions."""
        audit = recipe.audit
        ranges = {}
        for task in predictions.tasks:
            if isinstance(task, Regression):
                found = task.with_score_range(predictions.outputs[task.name]).score_range
                assert found is not None
                ranges[task.name] = found
        several = len(predictions.tasks) > 1
        deltas = {str(d): _delta(d, audit, predictions) for d in audit.deltas} if several else {}
        about = {
            "reference_model": method,
            "reference_seed": seed,
            "reference_data": "validation",
            "representation": "what the heads receive, L2-normalised; distance (1 - cos) / 2",
            "pair_distribution": "as audit pairs: independent uniform draws from the pools of two tasks",
            "exact": audit.exact,
            "pool_size": audit.pool_size,
            "n_pairs": audit.n_pairs,
            "eval_seed": audit.eval_seed,
            "pair_seed": audit.pair_seed,
            "checkpoint": f"{recipe.train.select}, chosen on validation"
            if recipe.train.select == "best"
            else "last epoch",
            "methods": {name: {"weighting": m.weighting, **m.args} for name, m in recipe.methods.items()},
        }
        return cls(deltas, ranges, about)

    def freeze(self, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        """Return the tasks with the frozen score ranges."""
        return tuple(self._frozen(task) for task in tasks)

    def _frozen(self, task: Task) -> Task:
        found = self.score_ranges.get(task.name)
        return replace(task, score_range=found) if isinstance(task, Regression) and found else task

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"deltas": self.deltas, "score_ranges": self.score_ranges, **self.about}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Protocol:
        """Read what :meth:`to_dict` gave."""
        ranges = {name: (float(pair[0]), float(pair[1])) for name, pair in values["score_ranges"].items()}
        about = {k: v for k, v in values.items() if k not in ("deltas", "score_ranges")}
        return cls(dict(values["deltas"]), ranges, about)


def _delta(name: Any, audit: Audit, predictions: Predictions) -> float:
    if isinstance(name, (int, float)):
        return float(name)
    kind, _, level = str(name).partition(":")
    tasks = [task.name for task in predictions.tasks]
    distances = metrics.pair_distances(
        predictions.embeddings,
        tasks,
        {t: torch.isfinite(predictions.scores[t]) for t in tasks},
        pool_size=audit.pool_size,
        n_pairs=audit.n_pairs,
        eval_seed=audit.eval_seed,
        pair_seed=audit.pair_seed,
    )
    if kind == "conformal":
        return metrics.conformal_delta(distances, float(level))
    return metrics.quantile_delta(distances, float(kind.removeprefix("p")) / 100)


def measure(
    recipe: Recipe, method: str, seed: int, predictions: dict[str, Predictions], protocol: Protocol
) -> dict[str, Any]:
    """Return everything that ``metrics.json`` holds of one method and seed."""
    spec = recipe.methods[method]
    content: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "weighting": spec.weighting,
        "settings": _settings(recipe, method),
        "utility": {part: metrics.utility(p) for part, p in predictions.items()},
        "audit": {part: _audits(recipe, p, protocol) for part, p in predictions.items()},
        "groups": {part: _groups(recipe, p) for part, p in predictions.items()},
    }
    if method == recipe.reference and recipe.audit.shrinkage:
        content["shrinkage"] = {part: _shrinkage(p, protocol) for part, p in predictions.items()}
    if protocol.deltas:
        content["drift"] = {part: _induced(recipe, p) for part, p in predictions.items()}
    return content


def _settings(recipe: Recipe, method: str) -> dict[str, Any]:
    """Return what the recipe says of a method, under it every default of a weighting of ours."""
    spec = recipe.methods[method]
    cls = OUR_WEIGHTINGS.get(spec.weighting)
    resolved = cls.settings_class.from_args(spec.weighting, spec.args).model_dump() if cls else {}
    return {**resolved, **{k: v for k, v in spec.model_dump().items() if k != "weighting"}}


def _audits(recipe: Recipe, predictions: Predictions, protocol: Protocol) -> list[dict[str, Any]]:
    audit, found = recipe.audit, []
    for name, delta in protocol.deltas.items():
        report = metrics.FixedDeltaAudit(
            delta,
            audit.pool_size,
            audit.n_pairs,
            audit.eval_seed,
            audit.pair_seed,
            exact=audit.exact,
            delta_source=name,
        ).run(predictions.scores)
        pairs = report.per_pair.to_dict("records")
        entry = {"delta_name": name, "delta": delta, "bias": report.bias, "violation_rate": report.violation_rate}
        found.append({**entry, "exact": audit.exact, "per_pair": pairs})
    return found


def _shrinkage(predictions: Predictions, protocol: Protocol) -> list[dict[str, Any]]:
    """Return the curve of the shrunk reference; none unless all tasks are binary, as its Brier must be the run's."""
    if len(predictions.tasks) < 2 or any(task.kind != "binary" for task in predictions.tasks):
        return []
    rows: list[dict[str, Any]] = []
    for label, delta in protocol.deltas.items():
        curve = metrics.shrinkage_curve(predictions.scores, predictions.labels, delta)
        rows += [{"delta_name": label, **{str(k): v for k, v in row.items()}} for row in curve.to_dict("records")]
    return rows


def _groups(recipe: Recipe, predictions: Predictions) -> list[dict[str, Any]]:
    if not predictions.groups:
        return []
    settings = recipe.metrics
    found = metrics.GroupMetrics(
        list(predictions.tasks),
        {name: len(names) for name, names in predictions.group_names.items()},
        threshold=settings.threshold,
        empty=settings.empty,
        missing=settings.missing,
        min_group_size=settings.min_group_size,
        group_names=predictions.group_names,
        confidence=settings.confidence,
        n_bootstrap=settings.n_bootstrap,
    )
    frame = found.update(predictions.outputs, predictions.labels, predictions.groups).compute()
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _induced(recipe: Recipe, predictions: Predictions) -> dict[str, Any]:
    thresholds = metrics.induced_thresholds(predictions.embeddings, predictions.scores)
    return {"tasks": [t.name for t in predictions.tasks], "induced": np.asarray(thresholds).tolist()}


def pool_embeddings(recipe: Recipe, predictions: dict[str, Predictions]) -> dict[str, Any]:
    """Return the embeddings of each part's audit pool, ready for an npz file: ``<part>/rows``, ``<part>/h[/<task>]``.

    The pool is that of examples with finite scores on every task; tasks of one model share it.
    """
    found: dict[str, Any] = {}
    for part, p in predictions.items():
        finite = torch.stack([torch.isfinite(s) for s in p.scores.values()]).all(0).numpy()
        rows = draw_pool(finite, recipe.audit.pool_size, recipe.audit.eval_seed)
        found[f"{part}/rows"] = rows
        if isinstance(p.embeddings, dict):
            found |= {f"{part}/h/{task}": h[rows].numpy() for task, h in p.embeddings.items()}
        elif p.embeddings is not None:
            found[f"{part}/h"] = p.embeddings[rows].numpy()
    return found
