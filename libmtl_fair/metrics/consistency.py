"""Consistency audit: are people who are alike treated alike? In one task or many, on ranks, whatever the method (ours).

METHODS.md, 1.3. Ranks are among the same model's validation scores, so that shrinking, or any other strictly increasing map of
a task's scores, changes nothing; a model that knows nothing of who is like whom has an inconsistency of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
from torch import Tensor

from libmtl_fair.arrays import Bools, Floats, Values, as_floats, as_numpy, records
from libmtl_fair.errors import DataError, unknown
from libmtl_fair.files import Json
from libmtl_fair.metrics.intervals import normal_width
from libmtl_fair.metrics.near_pairs import Distance, Features, NearPairs, Weights, find_near_pairs, reference_matrix
from libmtl_fair.metrics.ranks import LEAST_GINI, LIMITS, RankedTask, Scores, apart, gini, mean_known
from libmtl_fair.metrics.scores import Held, thresholds_in_use
from libmtl_fair.predictions import Predictions

Twins: TypeAlias = Scores | Mapping[str, Scores | Sequence[Scores]]
_WORST = 10
_WORST_COLUMNS = ["row", "other", "distance", "inconsistency"]
_METRICS = ("calibrated", *(f"violation_{limit:g}" for limit in LIMITS), "decisions", "flip")


@dataclass(frozen=True, repr=False, eq=False)
class ConsistencyReport:
    """What a consistency audit found; NaN where something is undefined.

    Attributes
    ----------
    inconsistency : float
        I, the mean over tasks of I_t: how far apart near people are in rank, in units of any two people.
    interval : tuple of (float, float)
        (low, high) of I, node-robust.
    per_task : DataFrame
        One row a task: task, inconsistency, low, high, calibrated (Ic), violation_0.1, violation_0.3 (V), decisions
        (D), selected (share), gini, flip (F, mean over attributes), undefined (why, or "").
    decisions : dict of str to float
        Task -> D_t, near people with different decisions, in units of any two people.
    cross_task : float
        X, whether a person's profile over tasks changes between near people.
    flips : DataFrame
        Attribute, task, flip (F_t), changed (share of decisions that change when the sensitive value is swapped).
    split : DataFrame
        Attribute, pairs ("equal" or "different" sensitive value), n, share, inconsistency.
    worst_pairs : DataFrame
        The ten worst-treated pairs: row, other, distance, inconsistency (mean over tasks), and both ranks by task.
    protocol : dict of str to object
        n, anchors, k, pairs, quantiles of the distance, share at distance 0, what ranks refer to, confidence.
    """

    inconsistency: float
    interval: tuple[float, float]
    per_task: pd.DataFrame
    cross_task: float
    flips: pd.DataFrame
    split: pd.DataFrame
    worst_pairs: pd.DataFrame
    protocol: dict[str, object]
    pairs: NearPairs
    gaps: Floats

    @property
    def decisions(self) -> dict[str, float]:
        """D_t of every task."""
        return dict(zip(self.per_task["task"], self.per_task["decisions"]))

    @property
    def undefined(self) -> dict[str, str]:
        """Tasks without an inconsistency, and why."""
        found = dict(zip(self.per_task["task"], self.per_task["undefined"]))
        return {task: why for task, why in found.items() if why}

    @property
    def flip_gap(self) -> float:
        """F, the mean over attributes and tasks; NaN without flip twins."""
        return mean_known(self.flips["flip"])

    def rows(self) -> list[Json]:
        """Return task ("macro" for the mean over tasks), metric, value, low, high: NaN where there is no interval."""
        tasks = {str(row["task"]): row for row in records(self.per_task)}
        low, high = self.interval
        macro = {name: mean_known(self.per_task[name]) for name in _METRICS}
        macro |= {"cross_task": self.cross_task, "flip": self.flip_gap}
        macro |= {f"inconsistency[{r['attribute']}: {r['pairs']}]": r["inconsistency"] for r in records(self.split)}
        found = [("macro", "inconsistency", self.inconsistency, low, high)]
        found += [("macro", name, value, math.nan, math.nan) for name, value in macro.items()]
        for task, row in tasks.items():
            found.append((task, "inconsistency", row["inconsistency"], row["low"], row["high"]))
            found += [(task, name, row[name], math.nan, math.nan) for name in (*_METRICS, "selected", "gini")]
        for row in records(self.flips):
            each = ((f"{name}[{row['attribute']}]", row[name]) for name in ("flip", "changed"))
            found += [(row["task"], name, value, math.nan, math.nan) for name, value in each]
        return [dict(zip(("task", "metric", "value", "low", "high"), row)) for row in found]

    def to_dict(self) -> Json:
        """Return plain Python values, ready for JSON: rows, split, worst_pairs, undefined, protocol."""
        tables = {"rows": self.rows(), "split": records(self.split), "worst_pairs": records(self.worst_pairs)}
        return {**tables, "undefined": self.undefined, "protocol": self.protocol}

    def __repr__(self) -> str:
        """Return the audit in a few lines."""
        low, high = self.interval
        lines = [
            f"Inconsistency {self.inconsistency:.3f} [{low:.3f}, {high:.3f}] (0: alike are ranked alike; 1: as any two)"
        ]
        for row in records(self.split):
            who = f"{row['attribute']}, {row['pairs']}"
            lines.append(f"  {who}: {row['inconsistency']:.3f} ({row['share']:.0%} of near pairs)")
        for row in records(self.per_task):
            low, high = row["low"], row["high"]
            shown = f"{row['inconsistency']:.3f} [{low:.3f}, {high:.3f}]; decisions {row['decisions']:.3f}; flip {row['flip']:.3f}"
            lines.append(f"  {row['task']}: {'undefined, ' + row['undefined'] if row['undefined'] else shown}")
        return "\n".join([*lines, f"  across tasks {self.cross_task:.3f}, flip gap {self.flip_gap:.3f}"])


@dataclass(frozen=True, eq=False)
class ConsistencyAudit:
    """Measure whether people who are alike in a reference distance get scores that are alike in rank.

    Over near pairs E (each person and its k nearest others), with ranks r_t in [0, 1] among validation scores:
    ``I_t = mean_E |r_t(x) - r_t(y)| / G(r_t)``, G the mean difference of any two people; ``V_t(d) = P_E(|r_t(x) - r_t(y)| > d)``;
    ``D_t = P_E(decisions differ) / (2 q (1 - q))``; ``X = mean over task pairs of mean_E |(r_i - r_j)(x) - (r_i - r_j)(y)| /
    G(r_i - r_j)``; ``F_t = mean |r_t(x) - r_t(x')| / G(r_t)`` with the flip twin x'. A task with G below .05 is undefined.

    Parameters
    ----------
    features : Features or NearPairs
        [N, d], standardised (it is clipped at 5) and without what tells a sensitive attribute; a DataFrame of numbers
        and categories; or :class:`NearPairs` that were found before.
    weights : Weights, optional
        Of the features, see :func:`reference_matrix`.
    distance : Distance, optional
        A function d(x, y), or "precomputed" where ``features`` are the distances [N, N].
    k : int, default 10
        Near others of each person.
    reference_scores : Scores, optional
        Task -> [M] or [M, C], the model's validation scores, that ranks refer to; None: the audited ones.
    sensitive : mapping of str to Values or Values, optional
        Attribute -> [N], or [N]; below 0 or missing is unknown. Pairs are split by it.
    twins : Twins, optional
        Scores of the flip twins, as ``scores``: of one attribute, or attribute -> twins, or attribute -> a list of
        them, one for each other value, which are averaged. A person whose score there is NaN has no twin.
    anchors : int, default 20000
        Above so many people, near pairs are those of a draw of so many with ``seed``, still among all.
    train : Features, optional
        Rows that the numbers of ``features`` are standardised on; None: they are standardised already.
    confidence : float, default 0.95
        Of intervals.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> people = rng.normal(size=(500, 2))
    >>> audit = ConsistencyAudit(people)
    >>> bool(audit.run({"fair": people[:, 0]}).inconsistency < 0.2)
    True
    >>> bool(abs(audit.run({"random": rng.normal(size=500)}).inconsistency - 1) < 0.1)
    True
    """

    features: Features | NearPairs
    _: KW_ONLY
    weights: Weights | None = None
    distance: Distance | None = None
    k: int = 10
    reference_scores: Scores | None = None
    sensitive: Mapping[str, Values] | Values | None = None
    twins: Twins | None = None
    anchors: int = 20000
    seed: int = 0
    train: Features | None = None
    confidence: float = 0.95

    @cached_property
    def pairs(self) -> NearPairs:
        """The near pairs, found once."""
        if isinstance(self.features, NearPairs):
            return self.features
        if self.distance is None:
            matrix = reference_matrix(self.features, self.weights, self.train)
        else:
            matrix = as_floats(self.features.to_numpy() if isinstance(self.features, pd.DataFrame) else self.features)
        return find_near_pairs(matrix, self.k, self.anchors, self.seed, self.distance)

    def run(
        self,
        scores: Scores,
        *,
        reference_scores: Scores | None = None,
        twins: Twins | None = None,
        labels: Scores | None = None,
        thresholds: float | Mapping[str, float] = 0.5,
        decisions: Scores | None = None,
    ) -> ConsistencyReport:
        """Audit the scores of one or more tasks.

        Parameters
        ----------
        scores : Scores
            Task -> any scalar score [N], or probabilities of classes [N, C], whose values are averaged with class
            shares (the labels', else the mean probabilities). A person whose score is not finite is left out of the
            task.
        reference_scores, twins : Scores or None, Twins or None
            In place of the audit's own: they belong to a model.
        labels : Scores, optional
            Task -> labels of the people of ``reference_scores`` (0/1, or class ids; NaN or negative: missing), for the
            calibrated inconsistency Ic of binary tasks: near people's difference in the rate of positives at their
            rank.
        thresholds : float or mapping of str to float, default 0.5
            A score above it is a decision; one for all [N] scores within [0, 1], or by task. Classes: the likeliest.
        decisions : Scores, optional
            Task -> [N], in place of thresholds.

        Raises
        ------
        DataError
            No task, scores of another length than the features, or references that lack a task.
        """
        reference_scores, twins = reference_scores or self.reference_scores, twins or self.twins
        if not isinstance(scores, Mapping) or not scores:
            raise DataError("a consistency audit needs the scores of at least one task, as {task: [N]}")
        tasks = []
        for name, values in scores.items():
            held = as_floats(values)
            if len(held) != self.pairs.n or held.ndim > 2:
                raise DataError(
                    f"scores of task {name!r} must be [N] or [N, C] for {self.pairs.n} people, found {list(held.shape)}"
                )
            base = held if reference_scores is None else as_floats(_of(reference_scores, name, "reference_scores"))
            bar = thresholds.get(name) if isinstance(thresholds, Mapping) else thresholds
            decided = None if decisions is None else decisions.get(name)
            tasks.append(RankedTask(name, held, base, (labels or {}).get(name), bar, decided))
        return self._report(tasks, _by_attribute(twins), reference_scores is not None)

    def _report(self, tasks: list[RankedTask], twins: dict[str, list[Scores]], validated: bool) -> ConsistencyReport:
        pairs = self.pairs
        flips = [(attribute, t.name, *t.flip(each)) for attribute, each in twins.items() for t in tasks]
        flipped = pd.DataFrame(flips, columns=["attribute", "task", "flip", "changed"])
        found, parts = [], []
        for task in tasks:
            parts.append(own := task.gaps(pairs))
            named = zip(("task", "inconsistency", "low", "high"), (task.name, *self._interval(own)))
            flip = mean_known(flipped.loc[flipped["task"] == task.name, "flip"])
            found.append({**dict(named), **task.measured(pairs), "flip": flip, "undefined": task.undefined})
        defined = [task for task in tasks if not task.undefined]
        used = [own for own in parts if np.isfinite(own).all()]
        gaps = np.mean(used, axis=0) if used else np.full(pairs.neighbours.shape, math.nan)
        value, *interval = self._interval(gaps)
        ranks = "the model's validation scores" if validated else "the audited scores"
        return ConsistencyReport(
            inconsistency=value,
            interval=(interval[0], interval[1]),
            per_task=pd.DataFrame(found),
            cross_task=mean_known([_cross(pairs, a, b) for a, b in combinations(defined, 2)]),
            flips=flipped,
            split=_split(pairs, gaps, self.sensitive),
            worst_pairs=_worst(pairs, gaps, tasks) if defined else pd.DataFrame(columns=_WORST_COLUMNS),
            protocol={**pairs.describe(), "ranks": ranks, "confidence": self.confidence},
            pairs=pairs,
            gaps=gaps,
        )

    def _interval(self, gaps: Floats) -> tuple[float, float, float]:
        value = float(gaps.mean())
        return value, *_bounds(value, self.pairs.variance(gaps - value), self.confidence)


def consistency_ratio(
    method: ConsistencyReport, reference: ConsistencyReport, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return rho = I of one model over I of another, with its node-robust interval (low, high), over the same near pairs.

    Raises
    ------
    DataError
        The two audits have different near pairs.
    """
    if method.pairs.digest != reference.pairs.digest or method.gaps.shape != reference.gaps.shape:
        raise DataError("a ratio compares two models over the same near pairs; run one ConsistencyAudit on both")
    if not reference.inconsistency > 0:
        return math.nan, math.nan, math.nan
    rho = method.inconsistency / reference.inconsistency
    centred = (method.gaps - rho * reference.gaps) / reference.inconsistency
    return rho, *_bounds(rho, method.pairs.variance(centred), confidence)


def consistency_score(
    y_score: Values | Sequence[Values] | Scores, X: Features, *, leave_out: Iterable[str | int] = (), **options: Any
) -> float:
    """Return 1 - I, so that higher is better, as scikit-learn wants it: 1 alike are ranked alike, 0 as any two (or below).

    Parameters
    ----------
    y_score : Values or sequence of Values or Scores
        [N]; ``predict_proba``'s [N, 2] (the second column counts) or [N, C]; a list of these, or task -> one, for
        several tasks.
    X : Features
        [N, d] array or DataFrame, raw: numbers are standardised on these rows.
    leave_out : iterable of str or int, default ()
        Columns of X that are no reference: the sensitive ones and what tells them.
    **options : object
        Of :class:`ConsistencyAudit`.

    Examples
    --------
    >>> X = np.arange(100.0)[:, None]
    >>> consistency_score(X[:, 0] ** 3, X) > 0.8
    True
    """
    given = y_score if isinstance(y_score, list | tuple) and np.ndim(y_score[0]) else [y_score]
    scores = y_score if isinstance(y_score, Mapping) else {f"task {i}": v for i, v in enumerate(given)}
    frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(as_floats(X))
    for name in (leave_out := list(leave_out)):
        if name not in frame:
            raise DataError(f"leave_out: {unknown('column', str(name), map(str, frame))}")
    frame = frame.drop(columns=leave_out)
    arrays = {task: as_floats(values) for task, values in scores.items()}
    arrays = {task: v[:, 1] if v.ndim == 2 and v.shape[1] == 2 else v for task, v in arrays.items()}
    return 1 - ConsistencyAudit(frame, train=frame, **options).run(arrays).inconsistency


def consistency_scorer(**options: Any) -> Callable[[object, Features, object], float]:
    """Return ``scorer(estimator, X, y)`` for ``cross_validate`` or ``GridSearchCV``: :func:`consistency_score` of predictions.

    Of ``predict_proba`` where the estimator has it, else of ``decision_function``, else of ``predict``.
    """

    def scorer(estimator: object, X: Features, y: object = None) -> float:
        how = next(n for n in ("predict_proba", "decision_function", "predict") if hasattr(estimator, n))
        return consistency_score(getattr(estimator, how)(X), X, **options)

    return scorer


def _cross(pairs: NearPairs, a: RankedTask, b: RankedTask) -> float:
    """Return the mean over near pairs of how far their differences between two tasks are apart, in units of any two people."""
    total = weight = 0.0
    for i in np.flatnonzero(a.weights):
        for j in np.flatnonzero(b.weights):
            profile = a.ranks[i] - b.ranks[j]
            spread = gini(profile[np.isfinite(profile)])
            if spread >= LEAST_GINI:
                share = float(a.weights[i] * b.weights[j])
                total, weight = total + share * mean_known(apart(pairs, profile)) / spread, weight + share
    return total / weight if weight else math.nan


def _split(pairs: NearPairs, gaps: Floats, sensitive: Mapping[str, Values] | Values | None) -> pd.DataFrame:
    given = {} if sensitive is None else sensitive if isinstance(sensitive, Mapping) else {"sensitive": sensitive}
    found = []
    for attribute, values in given.items():
        column = as_numpy(values)
        if len(column) != pairs.n:
            raise DataError(f"sensitive attribute {attribute!r} has {len(column)} values for {pairs.n} people")
        codes = np.where(column >= 0, column, -1) if column.dtype.kind in "if" else pd.factorize(column)[0]
        first, second = codes[pairs.anchors][:, None], codes[pairs.neighbours]
        known: Bools = (first >= 0) & (second >= 0)
        for name, chosen in (("equal", first == second), ("different", first != second)):
            taken = gaps[known & chosen]
            found.append((attribute, name, len(taken), len(taken) / max(1, int(known.sum())), mean_known(taken)))
    return pd.DataFrame(found, columns=["attribute", "pairs", "n", "share", "inconsistency"])


def _worst(pairs: NearPairs, gaps: Floats, tasks: list[RankedTask]) -> pd.DataFrame:
    """Return the ten pairs that are furthest apart; of equal ones the nearest first; a pair counts once."""
    first = np.repeat(pairs.anchors, pairs.k)
    row, other = np.minimum(first, pairs.neighbours.ravel()), np.maximum(first, pairs.neighbours.ravel())
    order = np.lexsort((other, row, pairs.distances.ravel(), -gaps.ravel()))[: 2 * _WORST]
    columns = [part[order] for part in (row, other, pairs.distances.ravel(), gaps.ravel())]
    frame = pd.DataFrame(dict(zip(_WORST_COLUMNS, columns))).drop_duplicates(["row", "other"]).head(_WORST)
    for task in tasks:
        if len(task.ranks) == 1:
            frame[f"{task.name}, row"], frame[f"{task.name}, other"] = (
                task.ranks[0][frame[at]] for at in ("row", "other")
            )
    return frame.reset_index(drop=True)


def _by_attribute(twins: Twins | None) -> dict[str, list[Scores]]:
    """Return attribute -> one twin for each other value, of any of the forms that twins may have."""
    found: dict[str, list[Scores]] = {}
    plain: dict[str, Values] = {}
    for name, value in (twins or {}).items():
        if isinstance(value, Mapping):
            found[name] = [value]
        elif isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
            found[name] = list(value)
        elif not isinstance(value, Mapping):
            plain[name] = cast("Values", value)
    return found | ({"sensitive": [plain]} if plain else {})


def _of(given: Scores, name: str, what: str) -> Values:
    if name not in given:
        raise DataError(f"{what}: {unknown('task', name, given)}")
    return given[name]


def _bounds(value: float, variance: float, confidence: float) -> tuple[float, float]:
    half = normal_width(confidence) * math.sqrt(variance)
    return (max(0.0, value - half), value + half) if math.isfinite(value) else (math.nan, math.nan)


_SEVERAL = ("multilabel", "binary_sequence")
"""Kinds of task that decide several times about a person: none of these is the person's decision."""


def audit_people(
    audit: ConsistencyAudit,
    predictions: Predictions,
    reference: Predictions | None = None,
    twins: Mapping[str, Sequence[Predictions]] | None = None,
    threshold: float | str | Held = 0.5,
) -> ConsistencyReport:
    """Return the consistency audit of predictions.

    Ranked are probabilities (of each class or label), predicted values of a regression, else audit scores.

    Parameters
    ----------
    audit : ConsistencyAudit
        Of the same people.
    reference : Predictions, optional
        The model's validation predictions: ranks refer to them, and their labels calibrate; None: the audit's own, or
        the predictions themselves.
    twins : mapping of str to sequence of Predictions, optional
        Attribute -> predictions of the same people with each other sensitive value; who has no known group has no twin.
    threshold : float or str or Held, default 0.5
        Of decisions of binary tasks: a number, task -> number, or "base_rate": of the reference's labels.
    """
    base = reference or predictions
    several = {task.name for task in predictions.tasks if task.kind in _SEVERAL}
    held = thresholds_in_use(base, threshold)
    bars = {name: bar for name, bar in held.items() if isinstance(bar, float) and name not in several}
    none = np.full(len(predictions), np.nan)
    lacking = {attribute: predictions.groups[attribute].numpy() < 0 for attribute in twins or {}}
    return audit.run(
        scores_of(predictions),
        reference_scores=None if reference is None else scores_of(reference),
        twins={a: [_hidden(scores_of(p), lacking[a]) for p in each] for a, each in (twins or {}).items()} or None,
        labels={
            name: labels.numpy() for name, labels in base.labels.items() if base.task(name).kind != "binary_sequence"
        }
        if reference is not None
        else None,
        thresholds=bars,
        decisions=dict.fromkeys(several, none),
    )


def scores_of(predictions: Predictions) -> dict[str, Tensor]:
    """Return what is ranked of every task, [N] or [N, C]."""
    ranked = ("multiclass", "multilabel", "regression", "binary")
    return {
        task.name: task.probabilities(predictions.outputs[task.name])
        if task.kind in ranked
        else predictions.scores[task.name]
        for task in predictions.tasks
    }


def _hidden(scores: Mapping[str, Tensor], lacking: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Scores:
    found = {}
    for task, values in scores.items():
        held = values.double().numpy().copy()
        held[lacking] = np.nan
        found[task] = held
    return found
