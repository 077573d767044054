"""Pools and pairs of the sampled audit, and the reference tolerance: a quantile or bound of distances of such pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.metrics.arrays import Bools, Floats, Ints, Values, as_floats, as_numpy

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
