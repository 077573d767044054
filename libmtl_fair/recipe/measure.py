"""What is measured of one trained method and seed: utility, audit, shrinkage envelope, group metrics, drift."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from libmtl_fair import metrics
from libmtl_fair.arrays import records
from libmtl_fair.errors import CheckpointError, DamagedFileError
from libmtl_fair.files import Json, file_digest, read_json
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.metrics.audit import draw_pool
from libmtl_fair.metrics.drift import targets
from libmtl_fair.metrics.scores import Held
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Audit
from libmtl_fair.tasks import Ranged, Task

Ranges = dict[str, tuple[float, float]]
_BY_SEED = "score_ranges_by_seed"


@dataclass(frozen=True)
class Protocol:
    """The tolerances (name -> [0, 1]) and score ranges of a run, fixed once from the reference's validation data.

    Attributes
    ----------
    deltas : dict of str to float
        Of the reference's first seed, for all.
    score_ranges : Ranges
        Regression task -> (q10, q90) of outputs in standardised units, of the reference's first seed.
    about : Json
        Where they come from.
    by_seed : dict of int to Ranges
        Seed -> score ranges of that seed's reference; a seed that is not there has those of the first, as have all in
        runs of before.
    """

    deltas: dict[str, float]
    score_ranges: Ranges
    about: Json = field(default_factory=dict)
    by_seed: dict[int, Ranges] = field(default_factory=dict)

    @classmethod
    def choose(cls, recipe: Recipe, method: str, seed: int, predictions: Predictions) -> Protocol:
        """Choose tolerances and score ranges from the reference model's validation predictions."""
        audit, best = recipe.audit, recipe.train.select == "best"
        ranges = _score_ranges(predictions)
        several = len(predictions.tasks) > 1
        deltas = {str(d): _delta(d, audit, predictions) for d in audit.deltas} if several else {}
        about = {
            "reference_model": method,
            "reference_seed": seed,
            "reference_data": "validation",
            "representation": "what the heads receive, L2-normalised; distance (1 - cos) / 2",
            "pair_distribution": "as audit pairs: independent uniform draws from the pools of two tasks",
            "exact": audit.exact,
            **audit.draws,
            "checkpoint": "best, chosen on validation" if best else "last epoch",
            "methods": {name: {"weighting": m.weighting, **m.args} for name, m in recipe.methods.items()},
        }
        return cls(deltas, ranges, about, {seed: ranges} if ranges else {})

    def lacks(self, method: str, seed: int) -> bool:
        """Whether this is a model of the reference whose score ranges are still to be taken in."""
        return bool(self.by_seed) and method == self.about.get("reference_model") and seed not in self.by_seed

    def with_seed(self, seed: int, predictions: Predictions) -> Protocol:
        """Return the protocol with the score ranges of one more seed's reference, from its validation predictions."""
        return replace(self, by_seed={**self.by_seed, seed: _score_ranges(predictions)})

    def freeze(self, tasks: tuple[Task, ...], seed: int) -> tuple[Task, ...]:
        """Return the tasks with the frozen score ranges of a seed."""
        known = self.by_seed.get(seed, self.score_ranges)
        return tuple(t.ranged(known[t.name]) if isinstance(t, Ranged) and t.name in known else t for t in tasks)

    def to_dict(self) -> Json:
        """Return plain values."""
        by_seed = {_BY_SEED: {str(seed): ranges for seed, ranges in self.by_seed.items()}} if self.by_seed else {}
        return {"deltas": self.deltas, "score_ranges": self.score_ranges, **by_seed, **self.about}

    @classmethod
    def read(cls, path: Path) -> Protocol:
        """Read the file of a run; DamagedFileError where it is not what was written."""
        try:
            return cls.from_dict(read_json(path, sealed=True))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise DamagedFileError(
                f"{path} is damaged: expected deltas and score_ranges as a run writes them ({type(error).__name__}: {error}); "
                "run again with --resume to make it anew"
            ) from error

    @classmethod
    def from_dict(cls, values: Json) -> Protocol:
        """Read what :meth:`to_dict` gave."""
        by_seed = {int(seed): _pairs(ranges) for seed, ranges in values.get(_BY_SEED, {}).items()}
        about = {k: v for k, v in values.items() if k not in ("deltas", "score_ranges", _BY_SEED)}
        deltas = {name: float(delta) for name, delta in values["deltas"].items()}
        return cls(deltas, _pairs(values["score_ranges"]), about, by_seed)


def _score_ranges(predictions: Predictions) -> Ranges:
    raw = {**predictions.outputs, **predictions.raw}
    fixed = [t.with_score_range(raw[t.name]) for t in predictions.tasks if isinstance(t, Ranged)]
    return {task.name: task.score_range for task in fixed if task.score_range is not None}


def _pairs(ranges: Json) -> Ranges:
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def _delta(name: float | str, audit: Audit, predictions: Predictions) -> float:
    if not isinstance(name, str):
        return float(name)
    known = {task.name: torch.isfinite(predictions.scores[task.name]) for task in predictions.tasks}
    distances = metrics.pair_distances(predictions.embeddings, list(known), known, **audit.draws)
    if name.startswith("conformal:"):
        return metrics.conformal_delta(distances, float(name.removeprefix("conformal:")))
    return metrics.quantile_delta(distances, float(name.removeprefix("p")) / 100)


def measure(recipe: Recipe, method: str, seed: int, predictions: Mapping[str, Predictions], protocol: Protocol) -> Json:
    """Return everything that ``metrics.json`` holds of one method and seed."""

    def each(of: Callable[[Predictions], object]) -> Json:
        return {part: of(p) for part, p in predictions.items()}

    settings, weighting = recipe.methods[method].model_dump(), recipe.methods[method].weighting
    settings.pop("weighting", None)
    if weighting in OUR_WEIGHTINGS:
        settings_class = OUR_WEIGHTINGS[weighting].settings_class
        settings = settings_class.from_args(weighting, recipe.methods[method].args).model_dump() | settings
    base_rate = metrics.base_rate_thresholds(predictions["val"])
    in_use = metrics.thresholds_in_use(predictions["val"], recipe.metrics.threshold)
    content: Json = {
        "method": method,
        "seed": seed,
        "thresholds": {"base_rate": base_rate, "in_use": in_use},
        "weighting": weighting,
        "settings": settings,
        "utility": each(lambda p: metrics.utility(p, in_use)),
        "utility_base_rate": each(lambda p: metrics.utility(p, base_rate)),
        "audit": each(
            lambda p: [_audit(recipe.audit, p, *named) for named in protocol.deltas.items() if not p.decided]
        ),
        "groups": each(lambda p: _groups(recipe, p, in_use)),
        "groups_base_rate": each(lambda p: _groups(recipe, p, base_rate)),
    }
    if recipe.audit.shrinkage and protocol.deltas:
        content["native_error"] = each(metrics.native_error)
        if method == recipe.reference:
            content["shrinkage"] = each(lambda p: _shrinkage(p, protocol))
    if protocol.deltas and all(p.embeddings is not None for p in predictions.values()):
        content["drift"] = each(_induced)
    return content


def scores_digest(predictions: Predictions) -> str:
    """Return a digest of the audit scores: the same before saving and after loading."""
    found = hashlib.sha256()
    for task, scores in predictions.scores.items():
        found.update(task.encode() + scores.double().numpy().tobytes())
    return found.hexdigest()


def digests(folder: Path, predictions: Mapping[str, Predictions]) -> Json:
    """Return what ``metrics.json`` records of each saved file of predictions: its digest, and that of its scores."""
    paths = {part: folder / f"predictions_{part}.parquet" for part in predictions}
    return {
        part: {"file": file_digest(path), "scores": scores_digest(predictions[part])} for part, path in paths.items()
    }


def _audit(audit: Audit, predictions: Predictions, name: str, delta: float) -> Json:
    found = metrics.FixedDeltaAudit(delta, **audit.draws, exact=audit.exact, delta_source=name).run(predictions.scores)
    entry = {"delta_name": name, "delta": delta, "bias": found.bias, "violation_rate": found.violation_rate}
    if not audit.exact:  # the shrinkage envelope is exact
        entry["exact_bias"] = metrics.FixedDeltaAudit(delta, exact=True).run(predictions.scores).bias
    return {**entry, "exact": audit.exact, "per_pair": records(found.per_pair)}


def _shrinkage(predictions: Predictions, protocol: Protocol) -> list[Json]:
    """Return the envelope of the shrunk reference, over centre and strength, for each tolerance."""
    scores, wanted = predictions.scores, targets(predictions)
    curves = {name: metrics.shrinkage_curve(scores, wanted, delta) for name, delta in protocol.deltas.items()}
    return [{"delta_name": name, **row} for name, curve in curves.items() for row in records(curve)]


def _groups(recipe: Recipe, predictions: Predictions, threshold: float | str | Held) -> list[Json]:
    if not predictions.groups:
        return []
    found = metrics.GroupMetrics(
        list(predictions.tasks),
        {name: len(names) for name, names in predictions.group_names.items()},
        group_names=predictions.group_names,
        **recipe.metrics.model_dump() | {"threshold": threshold},
    )
    table = found.update(predictions.outputs, predictions.labels, predictions.groups).compute()
    return records(table[~((table["metric"] == "auc") & table["task"].isin(predictions.decided))])


def _induced(predictions: Predictions) -> Json:
    thresholds = metrics.induced_thresholds(predictions.embeddings, predictions.scores)
    return {"tasks": [t.name for t in predictions.tasks], "induced": np.asarray(thresholds).tolist()}


def pool_embeddings(recipe: Recipe, predictions: Mapping[str, Predictions]) -> Json:
    """Return the embeddings of each part's audit pool (examples with finite scores on every task): ``<part>/h[/<task>]``."""
    found: Json = {}
    for part, p in predictions.items():
        finite = torch.stack([torch.isfinite(s) for s in p.scores.values()]).all(0).numpy()
        rows = found[f"{part}/rows"] = draw_pool(finite, recipe.audit.pool_size, recipe.audit.eval_seed)
        if isinstance(p.embeddings, dict):
            found |= {f"{part}/h/{task}": h[rows].numpy() for task, h in p.embeddings.items()}
        elif p.embeddings is not None:
            found[f"{part}/h"] = p.embeddings[rows].numpy()
    return found
