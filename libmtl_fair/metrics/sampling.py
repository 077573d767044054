"""Pools and index pairs of the sampled audit: drawn from seeds and sizes alone, the same for every method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from libmtl_fair.metrics.arrays import Bools, Ints


def draw_pool(mask: Bools, pool_size: int | None, eval_seed: int) -> Ints:
    """Return the rows of one task's pool: ``pool_size`` valid rows without replacement, or all if there are fewer.

    The draw depends on the seed and on the number of valid rows only, so tasks with the same valid rows share their pool
    and every method audited gets the same rows.
    """
    rows = np.flatnonzero(mask)
    if pool_size is None or len(rows) <= pool_size:
        return rows
    chosen = np.random.default_rng(eval_seed).choice(len(rows), size=pool_size, replace=False)
    return np.asarray(rows[chosen])


def draw_pools(masks: Mapping[str, Bools], pool_size: int | None, eval_seed: int) -> dict[str, Ints]:
    """Return the pool rows of every task that has valid examples."""
    return {task: draw_pool(mask, pool_size, eval_seed) for task, mask in masks.items() if mask.any()}


def draw_pairs(first: int, second: int, size_a: int, size_b: int, n_pairs: int, pair_seed: int) -> tuple[Ints, Ints]:
    """Return ``n_pairs`` independent uniform positions in the pools of tasks number ``first`` and ``second``.

    Each task pair has a stream of its own, so its draws do not depend on which other tasks are audited.
    """
    generator = np.random.default_rng((pair_seed, first, second))
    return generator.integers(0, size_a, n_pairs), generator.integers(0, size_b, n_pairs)
