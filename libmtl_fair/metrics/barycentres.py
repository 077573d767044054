"""Demographic parity after training: scores moved to the Wasserstein barycentre of the groups, by ``equipy``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.errors import DataError, FairMTLError
from libmtl_fair.metrics.arrays import as_floats
from libmtl_fair.metrics.post_processing import _group_names

if TYPE_CHECKING:
    from libmtl_fair.predictions import Predictions


class Barycentre:
    """Scores of one task whose distribution is the same in every group; made by :func:`barycentre`.

    Attributes
    ----------
    transport : the fitted ``equipy.fairness.FairWasserstein``.
    task, sensitive : what it moves, and by which attributes.
    groups : names of the groups that it knows.
    """

    def __init__(self, transport: Any, task: str, sensitive: Sequence[str], groups: Sequence[str]) -> None:
        """Keep the fitted transport."""
        self.transport, self.task = transport, task
        self.sensitive, self.groups = tuple(sensitive), tuple(groups)

    def scores(self, predictions: Predictions, epsilon: float = 0.0) -> NDArray[np.float64]:
        """Return the task's probabilities (values, for regression), moved: [N].

        ``epsilon`` in [0, 1] is the share of the original that is kept: 0 is parity, 1 changes nothing. A row of a group
        that validation did not have, or of none, keeps its own.
        """
        if not 0 <= epsilon <= 1:
            raise DataError(f"epsilon must be in [0, 1], found {epsilon!r}")
        moved = _values(predictions, self.task)
        shown = _group_names(predictions, self.sensitive)
        rows = np.flatnonzero(np.isin(shown, self.groups))
        if len(rows):
            moved[rows] = self.transport.transform(moved[rows], shown[rows].astype(str), epsilon=epsilon)
        return moved


def barycentre(
    predictions: Predictions, task: str, *, sensitive: str | Sequence[str] | None = None, sigma: float = 1e-4
) -> Barycentre:
    """Learn from (validation) predictions of a binary or regression task how to bring the groups' scores together.

    Needs the optional package ``equipy`` (``pip install libmtl_fair[equipy]``). Several ``sensitive`` attributes mean their
    intersection. ``sigma`` is the width of the noise that breaks ties between equal scores. Source: Chzhen et al.,
    NeurIPS 2020.

    Raises
    ------
    FairMTLError : equipy is not installed.
    DataError : another kind of task, or fewer than two groups.
    """
    try:
        from equipy.fairness import FairWasserstein
    except ImportError as error:
        raise FairMTLError(
            "barycentre needs equipy, which is not installed: pip install libmtl_fair[equipy]"
        ) from error
    kind = predictions.task(task).kind
    if kind not in ("binary", "regression"):
        raise DataError(
            f"barycentre moves one score an example, and task {task!r} is {kind}; take a binary task or a regression"
        )
    names = (
        tuple(predictions.groups)
        if sensitive is None
        else (sensitive,)
        if isinstance(sensitive, str)
        else tuple(sensitive)
    )
    shown = _group_names(predictions, names)
    known = np.flatnonzero([_is_known(name) for name in shown])
    groups = sorted(set(shown[known]))
    if len(groups) < 2:
        raise DataError(
            f"barycentre of task {task!r}: expected at least two groups of {', '.join(names)}, found {groups}"
        )
    transport = FairWasserstein(sigma=sigma)
    transport.fit(_values(predictions, task)[known], shown[known].astype(str))
    return Barycentre(transport, task, names, groups)


def _is_known(name: str) -> bool:
    return all(part for part in name.split(" & "))


def _values(predictions: Predictions, task: str) -> NDArray[np.float64]:
    return np.array(
        as_floats(predictions.task(task).probabilities(predictions.outputs[task])), dtype=np.float64
    ).reshape(-1)
