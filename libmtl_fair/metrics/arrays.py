"""Small helpers that bring scores, labels and masks of any container to numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def as_numpy(values: Any) -> NDArray[Any]:
    """Return ``values`` (tensor, array, Series or list) as a numpy array; a CPU tensor is not copied."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def as_floats(values: Any) -> Floats:
    """Return ``values`` as a float64 array."""
    return np.asarray(as_numpy(values), dtype=np.float64)


def delta_matrix(delta: Any, tasks: Sequence[str]) -> Floats:
    """Return the tolerance of every task pair as a [T, T] matrix.

    ``delta`` is a number, or a symmetric [T, T] matrix in the order of ``tasks``.

    Raises
    ------
    DataError : wrong shape, not symmetric, negative or not finite.
    """
    matrix, size = as_floats(delta), len(tasks)
    if matrix.ndim == 0:
        matrix = np.full((size, size), float(matrix))
    if matrix.shape != (size, size):
        raise DataError(
            f"delta must be one number or a [{size}, {size}] matrix in the order of the tasks ({', '.join(tasks)}), "
            f"found shape {list(matrix.shape)}"
        )
    upper = np.triu_indices(size, 1)
    if not np.isfinite(matrix[upper]).all() or (matrix[upper] < 0).any():
        raise DataError("delta must be finite and at least 0 for every task pair; scores lie in [0, 1], so does delta")
    if not np.allclose(matrix[upper], matrix.T[upper], rtol=0, atol=1e-9):
        raise DataError("delta as a matrix must be symmetric: pair (i, j) and pair (j, i) are one task pair")
    return matrix


def score_arrays(
    scores: Mapping[str, Any], valid: Mapping[str, Any] | None
) -> tuple[dict[str, Floats], dict[str, Bools]]:
    """Return float64 scores and the mask of valid examples (finite score, and ``valid`` where given) of every task.

    Raises
    ------
    DataError : a task's scores are not one-dimensional, leave [0, 1], or do not fit its mask.
    """
    arrays: dict[str, Floats] = {}
    masks: dict[str, Bools] = {}
    for task, values in scores.items():
        score = as_floats(values)
        if score.ndim != 1:
            raise DataError(
                f"scores of task {task!r} must be [N], found shape {list(score.shape)}; use task.score(output)"
            )
        mask = np.isfinite(score)
        if valid is not None and task in valid:
            given = as_numpy(valid[task]).astype(bool)
            if given.shape != score.shape:
                raise DataError(
                    f"valid[{task!r}] must have the shape of its scores {list(score.shape)}, found {list(given.shape)}"
                )
            mask &= given
        _need_unit_range(task, score if mask.all() else score[mask])
        arrays[task], masks[task] = score, mask
    return arrays, masks


def _need_unit_range(task: str, score: Floats) -> None:
    if score.size and (score.min() < -1e-6 or score.max() > 1 + 1e-6):
        raise DataError(
            f"scores of task {task!r} must lie in [0, 1], found {score.min():.4g} to {score.max():.4g}; "
            "pass task.score(output), not raw outputs"
        )
