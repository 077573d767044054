"""Fixed-delta audit (ReLiF, arXiv:2606.10632): individual fairness across tasks under one tolerance for every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics.arrays import Bools, Floats, delta_matrix, score_arrays
from libmtl_fair.metrics.exact import exact_excesses
from libmtl_fair.metrics.sampling import draw_pairs, draw_pools

PAIR_COLUMNS = ["task_a", "task_b", "bias", "violation_rate", "delta", "n_pairs"]


@dataclass(frozen=True)
class AuditReport:
    """What a fixed-delta audit found.

    Attributes
    ----------
    bias : mean over task pairs of E[(|p_i - p_j| - delta)+], in [0, 1].
    violation_rate : mean over task pairs of P(|p_i - p_j| > delta), in [0, 1].
    per_pair : one row per task pair: task_a, task_b, bias, violation_rate, delta, n_pairs.
    protocol : what was drawn and how: delta and its source, exact or pools and seeds, tasks, examples per task.
    """

    bias: float
    violation_rate: float
    per_pair: pd.DataFrame
    protocol: dict[str, Any]
    _audit: FixedDeltaAudit = field(repr=False, compare=False)
    _scores: dict[str, Floats] = field(repr=False, compare=False)
    _masks: dict[str, Bools] = field(repr=False, compare=False)

    def at(self, delta: Any) -> AuditReport:
        """Return the audit of the same scores, pools and pairs under another ``delta`` (a number or [T, T])."""
        return self._audit.with_delta(delta).run(self._scores, self._masks)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks given, in order; those without valid examples included."""
        return list(self._scores)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        pairs = [{str(k): v for k, v in row.items()} for row in self.per_pair.to_dict("records")]
        return {"bias": self.bias, "violation_rate": self.violation_rate, "per_pair": pairs, "protocol": self.protocol}


@dataclass(frozen=True)
class FixedDeltaAudit:
    """Measure how far the scores of different tasks lie apart, beyond a tolerance that is held fixed.

    With gaps D = |p_i(x) - p_j(y)| between examples x of task i and y of task j:
    ``Bias_ij = mean((D - delta_ij)+)``, ``VR_ij = mean(1[D > delta_ij])``, both averaged over unordered task pairs.

    Parameters
    ----------
    delta : tolerance in [0, 1]: a number, or a symmetric [T, T] matrix in task order. Choose it once, from a reference
        model (:func:`conformal_delta`, :func:`quantile_delta`), and hold it fixed for every method.
    pool_size : examples drawn per task, without replacement, with ``eval_seed``; all if there are fewer.
    n_pairs : index pairs per task pair, drawn with replacement with ``pair_seed``.
    exact : the expectation over all pairs of all valid examples instead, in float64: no pools, no seeds, no sampling
        error (ours).
    delta_source : where the tolerance comes from, for the protocol (model, representation, pairs, quantile or alpha).

    >>> audit = FixedDeltaAudit(0.25, exact=True)
    >>> report = audit.run({"a": [0.0, 0.5], "b": [0.5, 1.0]})
    >>> report.bias, report.violation_rate
    (0.3125, 0.75)
    """

    delta: Any
    pool_size: int = 256
    n_pairs: int = 4096
    eval_seed: int = 0
    pair_seed: int = 42
    exact: bool = False
    delta_source: Any = None

    def __post_init__(self) -> None:
        """Check sizes and seeds."""
        for name, least in (("pool_size", 1), ("n_pairs", 1), ("eval_seed", 0), ("pair_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise RecipeError(f"FixedDeltaAudit: {name} must be an integer of at least {least}, found {value!r}")

    def with_delta(self, delta: Any, source: Any = None) -> FixedDeltaAudit:
        """Return the same protocol under another tolerance."""
        return FixedDeltaAudit(
            delta, self.pool_size, self.n_pairs, self.eval_seed, self.pair_seed, self.exact, delta_source=source
        )

    def run(self, scores: Mapping[str, Any], valid: Mapping[str, Any] | None = None) -> AuditReport:
        """Audit the scores of at least two tasks.

        Parameters
        ----------
        scores : mapping
            Task -> [N] in [0, 1], in task order; a score that is not finite makes the example invalid.
        valid : mapping, optional
            Task -> bool [N], examples to use; all finite ones where a task is not named.

        Returns
        -------
        AuditReport; a task without valid examples is absent: it drops out of the means.

        Raises
        ------
        DataError : fewer than two tasks (with valid examples), scores outside of [0, 1], or delta of the wrong shape.
        """
        arrays, masks = score_arrays(scores, valid)
        names = list(arrays)
        if len(names) < 2:
            raise DataError(f"a fixed-delta audit compares tasks: it needs at least two, found {names}")
        deltas = delta_matrix(self.delta, names)
        present = [t for t in names if masks[t].any()]
        if len(present) < 2:
            raise DataError(
                f"a fixed-delta audit needs two tasks with valid examples (finite scores); of {names} only {present} have any"
            )
        rows = (
            self._exact_rows(names, arrays, masks, deltas) if self.exact else self._rows(names, arrays, masks, deltas)
        )
        table = pd.DataFrame(dict(zip(PAIR_COLUMNS, zip(*rows))))
        means = table[["bias", "violation_rate"]].mean()
        protocol = self._protocol(masks)
        return AuditReport(float(means.iloc[0]), float(means.iloc[1]), table, protocol, self, arrays, masks)

    def _exact_rows(
        self, names: list[str], arrays: dict[str, Floats], masks: dict[str, Bools], deltas: Floats
    ) -> list[Any]:
        values = {t: arrays[t] if masks[t].all() else arrays[t][masks[t]] for t in names if masks[t].any()}
        found = exact_excesses(values, {(i, j): float(deltas[i, j]) for i, j in _pairs(names, masks)}, names)
        return [
            (names[i], names[j], bias, rate, float(deltas[i, j]), len(values[names[i]]) * len(values[names[j]]))
            for (i, j), (bias, rate) in found.items()
        ]

    def _rows(self, names: list[str], arrays: dict[str, Floats], masks: dict[str, Bools], deltas: Floats) -> list[Any]:
        pools = {t: arrays[t][rows] for t, rows in draw_pools(masks, self.pool_size, self.eval_seed).items()}
        rows = []
        for i, j in _pairs(names, masks):
            a, b = pools[names[i]], pools[names[j]]
            x, y = draw_pairs(i, j, len(a), len(b), self.n_pairs, self.pair_seed)
            excess = np.abs(a[x] - b[y]) - deltas[i, j]
            rate = np.count_nonzero(excess > 0) / self.n_pairs
            bias = float(np.maximum(excess, 0).mean())
            rows.append((names[i], names[j], bias, rate, float(deltas[i, j]), self.n_pairs))
        return rows

    def _protocol(self, masks: dict[str, Bools]) -> dict[str, Any]:
        delta = np.asarray(self.delta, dtype=float).tolist()
        common = {
            "delta": delta,
            "delta_source": self.delta_source,
            "exact": self.exact,
            "pairs": "all pairs of all valid examples" if self.exact else "uniform, with replacement, from the pools",
            "tasks": list(masks),
            "valid_examples": {t: int(m.sum()) for t, m in masks.items()},
            "absent_tasks": [t for t, m in masks.items() if not m.any()],
        }
        if self.exact:
            return common
        seeds = {"eval_seed": int(self.eval_seed), "pair_seed": int(self.pair_seed), "n_pairs": int(self.n_pairs)}
        pools = {t: min(int(m.sum()), int(self.pool_size)) for t, m in masks.items()}
        return {**common, "pool_size": int(self.pool_size), "pools": pools, **seeds}


def _pairs(names: list[str], masks: dict[str, Bools]) -> list[tuple[int, int]]:
    present = [i for i, t in enumerate(names) if masks[t].any()]
    return [(i, j) for a, i in enumerate(present) for j in present[a + 1 :]]
