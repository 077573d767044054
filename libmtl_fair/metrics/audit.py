"""Fixed-delta audit (ReLiF, arXiv:2606.10632): individual fairness across tasks under one tolerance, chosen once from a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeAlias

import numpy as np
import pandas as pd
from torch import Tensor

from libmtl_fair.arrays import Array, Bools, Floats, Ints, Values, as_floats, as_numpy, records
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.memory import need_memory
from libmtl_fair.metrics.consistency import ConsistencyReport
from libmtl_fair.summaries import Lines, Summarised

Found = Iterable[tuple[float, float, int]]
"""Bias, violation rate and number of pairs of each task pair."""
_PAIR_COLUMNS = ["task_a", "task_b", "bias", "violation_rate", "delta", "n_pairs"]
_MANY_TASKS = 7
_STEP, _BLOCK = 16, 1 << 12
"""Exact audit of many tasks: from so many on; scores between two tabulated ranks; scores worked on at a time."""


@dataclass(frozen=True, repr=False)
class AuditReport(Summarised):
    """What a fixed-delta audit found.

    Attributes
    ----------
    bias, violation_rate : float
        Means over task pairs of ``E[(|p_i - p_j| - delta)+]`` and of ``P(|p_i - p_j| > delta)``, in [0, 1].
    per_pair : DataFrame
        One row per task pair: task_a, task_b, bias, violation_rate, delta, n_pairs.
    protocol : dict of str to object
        What was drawn and how: delta and its source, exact or pools and seeds, tasks, examples per task.
    people : ConsistencyReport or None
        The audit of people of the same scores, where it was asked for.
    """

    bias: float
    violation_rate: float
    per_pair: pd.DataFrame
    protocol: dict[str, object]
    _audit: FixedDeltaAudit = field(repr=False, compare=False)
    _scores: dict[str, Floats] = field(repr=False, compare=False)
    _masks: dict[str, Bools] = field(repr=False, compare=False)
    people: ConsistencyReport | None = field(default=None, compare=False)

    def _summary(self) -> tuple[str, Lines]:
        lines = [("Bias", f"{self.bias:.4f}"), ("violation rate", f"{self.violation_rate:.4f}")]
        worst = self.per_pair.sort_values("bias", ascending=False).head(5)
        pairs = zip(worst["task_a"], worst["task_b"], worst["bias"], worst["violation_rate"])
        lines += [(f"{a} and {b}", f"Bias {bias:.4f}, violation rate {rate:.4f}") for a, b, bias, rate in pairs]
        if self.people is not None:
            lines.append(("people", f"inconsistency {self.people.inconsistency:.4f}"))
        delta = self.protocol.get("delta")
        shown = f"{delta:.4g}" if isinstance(delta, int | float) else "of each pair"
        return f"Fixed-delta audit, delta {shown}: {len(self.tasks)} tasks, {len(self.per_pair)} pairs", lines

    def at(self, delta: Values) -> AuditReport:
        """Return the audit of the same scores, pools and pairs under another ``delta`` (a number or [T, T])."""
        return self._audit.with_delta(delta).run(self._scores, self._masks)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks given, in order; those without valid examples included."""
        return list(self._scores)

    def to_dict(self) -> dict[str, object]:
        """Return plain Python values, ready for JSON."""
        pairs = records(self.per_pair)
        return {"bias": self.bias, "violation_rate": self.violation_rate, "per_pair": pairs, "protocol": self.protocol}


@dataclass(frozen=True)
class FixedDeltaAudit:
    """Measure how far the scores of different tasks lie apart, beyond a tolerance that is held fixed.

    With gaps ``D = |p_i(x) - p_j(y)|`` between examples x of task i and y of task j:
    ``Bias_ij = mean((D - delta_ij)+)``, ``VR_ij = mean(1[D > delta_ij])``, both averaged over unordered task pairs.

    Parameters
    ----------
    delta : Values
        Tolerance in [0, 1]: a number, or a symmetric [T, T] matrix in task order. Choose it once, from a reference
        model (:func:`conformal_delta`, :func:`quantile_delta`), and hold it fixed for every method.
    pool_size : int, default 256
        Examples drawn per task, without replacement, with ``eval_seed``; all if there are fewer.
    n_pairs : int, default 4096
        Index pairs per task pair, drawn with replacement with ``pair_seed``.
    exact : bool, default False
        The expectation over all pairs of all valid examples instead, in float64: no pools, no seeds, no sampling error
        (ours). O(n log n), and memory of the scores' order.
    delta_source : object, optional
        Where the tolerance comes from, for the protocol (model, representation, pairs, quantile or alpha).

    Examples
    --------
    >>> audit = FixedDeltaAudit(0.25, exact=True)
    >>> report = audit.run({"a": [0.0, 0.5], "b": [0.5, 1.0]})
    >>> report.bias, report.violation_rate
    (0.3125, 0.75)
    """

    delta: Values
    pool_size: int = 256
    n_pairs: int = 4096
    eval_seed: int = 0
    pair_seed: int = 42
    exact: bool = False
    delta_source: object = None

    def __post_init__(self) -> None:
        """Check sizes and seeds."""
        for name, least in (("pool_size", 1), ("n_pairs", 1), ("eval_seed", 0), ("pair_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise RecipeError(f"FixedDeltaAudit: {name} must be an integer of at least {least}, found {value!r}")

    def with_delta(self, delta: Values, source: object = None) -> FixedDeltaAudit:
        """Return the same protocol under another tolerance."""
        return replace(self, delta=delta, delta_source=source)

    def run(self, scores: Mapping[str, Values], valid: Mapping[str, Values] | None = None) -> AuditReport:
        """Audit the scores of at least two tasks.

        Parameters
        ----------
        scores : mapping of str to Values
            Task -> [N] in [0, 1], in task order; a score that is not finite makes the example invalid.
        valid : mapping of str to Values, optional
            Task -> bool [N], examples to use; all finite ones where a task is not named. A task without any is absent.

        Raises
        ------
        DataError
            Fewer than two tasks (with valid examples), scores outside of [0, 1], or delta of the wrong shape.
        """
        arrays = {task: as_floats(values) for task, values in scores.items()}
        masks = {task: _usable(task, score, (valid or {}).get(task)) for task, score in arrays.items()}
        if len(names := list(arrays)) < 2:
            raise DataError(f"a fixed-delta audit compares tasks: it needs at least two, found {names}")
        deltas = delta_matrix(self.delta, names)
        present = [t for t in names if masks[t].any()]
        if len(present) < 2:
            raise DataError(
                f"a fixed-delta audit needs two tasks with valid examples (finite scores); of {names} only {present} have any"
            )
        if not self.exact:
            need_memory(48.0 * self.n_pairs, f"{self.n_pairs:,} pairs of an audit", "give fewer n_pairs, or exact=True")
        biases, rates, many = zip(*(self._exact if self.exact else self._sampled)(arrays, masks, deltas))
        first, second = zip(*combinations([i for i, t in enumerate(names) if t in present], 2))
        columns = [names[i] for i in first], [names[j] for j in second], biases, rates, deltas[first, second], many
        table = pd.DataFrame(dict(zip(_PAIR_COLUMNS, columns)))
        bias, rate = (float(table[column].mean()) for column in ("bias", "violation_rate"))
        return AuditReport(bias, rate, table, self._protocol(masks), self, arrays, masks)

    def _exact(self, arrays: Mapping[str, Floats], masks: Mapping[str, Bools], deltas: Floats) -> Found:
        present = np.flatnonzero([mask.any() for mask in masks.values()])
        values = [a if m.all() else a[m] for a, m in zip(arrays.values(), masks.values()) if m.any()]
        upper = np.triu_indices(len(values), 1)
        tolerances = deltas[np.ix_(present, present)][upper]
        if len(values) >= _MANY_TASKS and np.ptp(tolerances) == 0:
            excess, above = ((table + table.T)[upper] for table in excess_tables(values, float(tolerances[0])))
        else:
            ordered = [(v := np.sort(part), np.append(0.0, v.cumsum())) for part in values]
            pairs = zip(*upper, tolerances)
            excess, above = np.transpose([_excess(*ordered[i], *ordered[j], delta) for i, j, delta in pairs])
        sizes = np.array([len(v) for v in values])
        many = sizes[upper[0]] * sizes[upper[1]]
        return zip((np.maximum(excess, 0) / many).tolist(), (above / many).tolist(), many.tolist())

    def _sampled(self, arrays: Mapping[str, Floats], masks: Mapping[str, Bools], deltas: Floats) -> Found:
        pools = [arrays[t][draw_pool(mask, self.pool_size, self.eval_seed)] for t, mask in masks.items()]
        for i, j, x, y in draw_pairs([len(pool) for pool in pools], self.n_pairs, self.pair_seed):
            excess = np.abs(pools[i][x] - pools[j][y]) - deltas[i, j]
            yield float(np.maximum(excess, 0).mean()), float(np.count_nonzero(excess > 0) / self.n_pairs), self.n_pairs

    def _protocol(self, masks: Mapping[str, Bools]) -> dict[str, object]:
        valid = {t: int(m.sum()) for t, m in masks.items()}
        common = {
            "delta": as_floats(self.delta).tolist(),
            "delta_source": self.delta_source,
            "exact": self.exact,
            "pairs": "all pairs of all valid examples" if self.exact else "uniform, with replacement, from the pools",
            "tasks": list(masks),
            "valid_examples": valid,
            "absent_tasks": [t for t, count in valid.items() if not count],
        }
        if self.exact:
            return common
        pools = {t: min(n, int(self.pool_size)) for t, n in valid.items()}
        sizes = {n: int(getattr(self, n)) for n in ("eval_seed", "pair_seed", "n_pairs")}
        return {**common, "pool_size": int(self.pool_size), "pools": pools, **sizes}


def delta_matrix(delta: Values, tasks: Sequence[str]) -> Floats:
    """Return the tolerance of every task pair, a number or a symmetric matrix in the order of ``tasks``, as [T, T]."""
    matrix, size = as_floats(delta), len(tasks)
    matrix = np.full((size, size), matrix) if matrix.ndim == 0 else matrix
    if matrix.shape != (size, size):
        wanted = f"one number or a [{size}, {size}] matrix in the order of the tasks ({', '.join(tasks)})"
        raise DataError(f"delta must be {wanted}, found shape {list(matrix.shape)}")
    upper = np.triu_indices(size, 1)
    if not np.isfinite(matrix[upper]).all() or (matrix[upper] < 0).any():
        raise DataError("delta must be finite and at least 0 for every task pair; scores lie in [0, 1], so does delta")
    if not np.allclose(matrix[upper], matrix.T[upper], rtol=0, atol=1e-9):
        raise DataError("delta as a matrix must be symmetric: pair (i, j) and pair (j, i) are one task pair")
    return matrix


def _usable(task: str, score: Floats, valid: Values | None) -> Bools:
    """Return which examples have a finite score and are ``valid``; checks shapes and range."""
    if score.ndim != 1:
        raise DataError(f"scores of task {task!r} must be [N], found shape {list(score.shape)}; use task.score(output)")
    mask = np.isfinite(score)
    if valid is not None:
        given, shape = as_numpy(valid).astype(bool), list(score.shape)
        if given.shape != score.shape:
            raise DataError(f"valid[{task!r}] must have the shape of its scores {shape}, found {list(given.shape)}")
        mask &= given
    used = score if mask.all() else score[mask]
    if used.size and (used.min() < -1e-6 or used.max() > 1 + 1e-6):
        raise DataError(
            f"scores of task {task!r} must lie in [0, 1], found {used.min():.4g} to {used.max():.4g}; "
            "pass task.score(output), not raw outputs"
        )
    return mask


def _excess(p: Floats, p_sums: Floats, q: Floats, q_sums: Floats, delta: float) -> tuple[float, float]:
    """Return the sum over all pairs of (|p - q| - delta)+, and the number of pairs beyond delta, of sorted scores.

    For every p the q above p + delta are a tail, those below p - delta a head. Ties are decided on the float64 p +- delta.
    """
    upper = p[: np.searchsorted(p, q[-1] - delta, side="right")] + delta
    lower = p[np.searchsorted(p, q[0] + delta, side="left") :] - delta
    head = np.searchsorted(q, upper, side="right")
    tail = np.searchsorted(q, lower, side="left")
    above = len(q) - head
    excess = q_sums[-1] * len(upper) - q_sums[head].sum() - above @ upper + tail @ lower - q_sums[tail].sum()
    return float(excess), float(above.sum() + tail.sum())


def excess_tables(scores: Sequence[Floats], delta: float) -> tuple[Floats, Floats]:
    """Return sums over all p of task i and q of task j of (p - delta - q)+, and of 1[q < p - delta], both [T, T].

    All scores are sorted together; counts and sums by task are tabulated at every 16th rank. A p takes those of the nearest one, by
    a product over tasks, and adds or takes back the few scores between. N log N + N T^2 / 16: 4 times faster at T = 40.
    """
    size, half = len(scores), _STEP // 2
    order = np.argsort(np.concatenate(scores))
    q, task = np.concatenate(scores)[order], np.repeat(np.arange(size), [len(part) for part in scores])[order]
    p = q - delta
    rank = np.searchsorted(q, p)
    nearest = (rank + half) // _STEP
    passed, codes = np.zeros((2, size)), size * size
    excess, below = np.zeros((2, size, size))
    start = int(np.searchsorted(rank, 1))
    for first in range(0, len(q) + _STEP, _BLOCK):
        here = slice(first, first + _BLOCK)
        held = _tabulated(q[here], task[here], np.arange(len(q[here])) // _STEP, size)
        under = held.cumsum(1) - held + passed[:, None]
        passed = passed + held.sum(1)
        stop = int(np.searchsorted(nearest, (first + _BLOCK) // _STEP))
        part, start = slice(start, stop), stop
        counts, sums = _tabulated(p[part], task[part], nearest[part] - first // _STEP, size)
        below += counts.T @ under[0]
        excess += sums.T @ under[0] - counts.T @ under[1]
        edge, mine, own = nearest[part] * _STEP, p[part], task[part] * size
        beyond = rank[part] - edge
        for step in range(-half, half):
            sign = 1 if step >= 0 else -1
            rows = np.flatnonzero(beyond > step if sign > 0 else (beyond <= step) & (edge + step < len(q)))
            others = edge[rows] + step
            code = own[rows] + task[others]
            below += sign * np.bincount(code, minlength=codes).reshape(size, size)
            excess += sign * np.bincount(code, mine[rows] - q[others], minlength=codes).reshape(size, size)
    return excess, below


def _tabulated(values: Floats, tasks: Array, rows: Array, size: int) -> Floats:
    """Return counts and sums of values by row (of one block) and task, [2, rows, T]."""
    code, shape = rows * size + tasks, (2, _BLOCK // _STEP, size)
    table = [np.bincount(code, weights, minlength=shape[1] * size) for weights in (None, values)]
    return np.asarray(table, dtype=np.float64).reshape(shape)


Embeddings: TypeAlias = Values | Mapping[str, Tensor] | Mapping[str, Values] | None
"""What the heads receive: [N, d] shared by all tasks, or task -> [N, d]."""


def draw_pool(mask: Bools, pool_size: int | None, eval_seed: int) -> Ints:
    """Return the rows of one task's pool: ``pool_size`` valid rows without replacement, or all if there are fewer.

    It depends on the seed and the number of valid rows only, so every method, and tasks with the same valid rows, share it.
    """
    rows = np.flatnonzero(mask)
    if pool_size is None or len(rows) <= pool_size:
        return rows
    return np.asarray(rows[np.random.default_rng(eval_seed).choice(len(rows), size=pool_size, replace=False)])


def draw_pairs(sizes: Sequence[int], n_pairs: int, pair_seed: int) -> Iterator[tuple[int, int, Ints, Ints]]:
    """Yield (i, j, places in pool i, places in pool j), [n_pairs] with replacement, of every two pools that hold any.

    Each task pair has a stream of its own, so its draws do not depend on which other tasks are audited.
    """
    for i, j in combinations(np.flatnonzero(sizes).tolist(), 2):
        draw = np.random.default_rng((pair_seed, i, j)).integers
        yield i, j, draw(0, sizes[i], n_pairs), draw(0, sizes[j], n_pairs)


def reference_pairs(
    masks: Mapping[str, Values],
    *,
    pool_size: int | None = 256,
    n_pairs: int = 4096,
    eval_seed: int = 0,
    pair_seed: int = 42,
) -> dict[tuple[str, str], tuple[Ints, Ints]]:
    """Return (task_a, task_b) -> (rows of a, rows of b), [n_pairs] each: reference pairs, drawn as audit pairs are.

    ``masks`` maps a task to bool [N], the examples that are valid for it; sizes and seeds are those of
    :class:`FixedDeltaAudit`.
    """
    names, pools = list(masks), [draw_pool(as_numpy(m).astype(bool), pool_size, eval_seed) for m in masks.values()]
    drawn = draw_pairs([len(pool) for pool in pools], n_pairs, pair_seed)
    return {(names[i], names[j]): (pools[i][x], pools[j][y]) for i, j, x, y in drawn}


def pair_distances(
    embeddings: Embeddings,
    tasks: Sequence[str],
    valid: Mapping[str, Values] | None = None,
    *,
    pool_size: int | None = 256,
    n_pairs: int = 4096,
    eval_seed: int = 0,
    pair_seed: int = 42,
) -> Floats:
    """Return the distances of all reference pairs, [P * n_pairs]: what :func:`quantile_delta` takes.

    ``embeddings`` are what the heads receive: [N, d] shared by all tasks, or task -> [N, d]. ``tasks`` are names in task
    order; ``valid`` maps a task to bool [N], for example finite scores (all rows with finite embeddings where it is not
    named). Sizes and seeds are those of :class:`FixedDeltaAudit`; ``pool_size=None`` takes all rows.

    Raises
    ------
    DataError
        Fewer than two tasks with valid examples.

    Examples
    --------
    >>> pair_distances(np.eye(4), ["a", "b"], n_pairs=1000).max().item()
    0.5
    """
    spaces = {t: task_embedding(embeddings, t) for t in tasks}
    masks = {t: np.isfinite(space).all(-1) for t, space in spaces.items()}
    for task in set(masks) & set(valid or {}):
        masks[task] &= as_numpy((valid or {})[task]).astype(bool)
    pairs = reference_pairs(masks, pool_size=pool_size, n_pairs=n_pairs, eval_seed=eval_seed, pair_seed=pair_seed)
    if not pairs:
        raise DataError(f"reference pairs need two tasks with valid examples, found tasks {list(tasks)}")
    return np.concatenate([cosine_distances(spaces[a][x], spaces[b][y]) for (a, b), (x, y) in pairs.items()])


def task_embedding(embeddings: Embeddings, task: str) -> Floats:
    """Return the embedding [N, d] that ``task``'s head receives."""
    if isinstance(embeddings, Mapping):
        if task not in embeddings:
            raise DataError(f"no embedding of task {task!r}; found: {', '.join(map(str, embeddings))}")
        embeddings = embeddings[task]
    space = as_floats(np.nan if embeddings is None else embeddings)
    if space.ndim != 2:
        raise DataError(f"embeddings of task {task!r} must be [N, d], found shape {list(space.shape)}")
    return space


def cosine_distances(a: Floats, b: Floats) -> Floats:
    """Return d(u, v) = (1 - cos(u, v)) / 2 over the last dimension, in [0, 1]; 1/2 where a row is zero."""
    return np.asarray(np.clip((1 - (normalise(a) * normalise(b)).sum(-1)) / 2, 0, 1))


def normalise(rows: Floats) -> Floats:
    """Return the rows at unit length; zero rows stay zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1))


def conformal_delta(distances: Values, alpha: float) -> float:
    """Return the split-conformal tolerance: D_(k) with k = ceil((n + 1)(1 - alpha)), or 1 if k > n.

    A new reference pair, exchangeable with the n given, exceeds it with probability at most ``alpha``.

    >>> conformal_delta([0.1, 0.2, 0.3, 0.4], alpha=0.5)
    0.3
    >>> conformal_delta([0.1, 0.2], alpha=0.1)
    1.0
    """
    if not 0 < alpha < 1:
        raise DataError(f"conformal_delta: alpha must lie in (0, 1), found {alpha!r}")
    values = np.sort(_distances(distances))
    # 1e-9: (n + 1)(1 - alpha) may be a hair above the whole number that it is on paper.
    k = max(math.ceil((len(values) + 1) * (1 - alpha) - 1e-9), 1)
    return float(values[k - 1]) if k <= len(values) else 1.0


def quantile_delta(distances: Values, q: float) -> float:
    """Return the ``q`` quantile of the reference-pair distances (``delta_p75`` is q = 0.75).

    >>> quantile_delta([0.0, 0.1, 0.2, 0.3, 0.4], 0.75)
    0.3
    """
    if not 0 <= q <= 1:
        raise DataError(f"quantile_delta: q must lie in [0, 1], found {q!r} (p75 is 0.75)")
    return float(np.quantile(_distances(distances), q))


def _distances(distances: Values) -> Floats:
    values = as_floats(distances).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise DataError(f"reference distances must be finite and at least one, found {len(values)} values")
    return values
