"""Scores of predictions by name (AUC, Brier, R2, ...), and the AUC of every group. No gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.functional._device import as_array

_EPS = torch.finfo(torch.float64).eps
_MISSING = -100


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of ``scores`` [N] for bool ``positive`` [N], a float64 scalar in [0, 1]; NaN with one class only.

    >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
    tensor(0.8750, dtype=torch.float64)
    """
    held, truth = as_array(scores), positive.cpu().numpy()
    return torch.tensor(_one_auc(_side(held[~truth]), _side(held[truth]))[0], dtype=torch.float64)


def group_auc(
    scores: Tensor,
    positive: Tensor,
    groups: Tensor,
    n_groups: int,
    *,
    weight: Tensor | None = None,
    errors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AUC of each group: the probability that a positive scores above a negative, ties counted half. No gradient. O(n log n).

    Parameters
    ----------
    scores, positive : Tensor
        [N], finite, of any dtype; bool [N].
    groups : Tensor
        Ids [N] in 0..G-1.
    weight : Tensor, optional
        [N]: an example counts as often (as in scikit-learn).
    errors : bool, default False
        DeLong's standard errors, too; with weights by weighted placements.

    Returns
    -------
    tuple of (Tensor, Tensor, Tensor, Tensor)
        (value, error, positives, negatives), each [G] on the CPU: float64 AUC, NaN where a group lacks positives or
        negatives; its standard error, NaN where fewer than two of either, or not asked for; counts.

    Examples
    --------
    >>> scores, positive = torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([False, True, False, True])
    >>> group_auc(scores, positive, torch.tensor([0, 0, 1, 1]), 2)[0].tolist()
    [1.0, 0.5]
    """
    code = positive.cpu().to(torch.int16 if n_groups < 1 << 14 else torch.int64).add_(groups.cpu(), alpha=2).numpy()
    order = np.argsort(code, kind="stable")  # linear in n for 16-bit codes
    sizes = np.bincount(code, minlength=2 * n_groups)
    held, weights = as_array(scores)[order], None if weight is None else as_array(weight.double())[order]
    found, ends = np.full((2, n_groups), np.nan), [0, *sizes.cumsum().tolist()]
    for g in range(n_groups):
        parts = (slice(*ends[k : k + 2]) for k in (2 * g, 2 * g + 1))
        sides = [_side(held[part], None if weights is None else weights[part]) for part in parts]
        found[:, g] = _one_auc(sides[0], sides[1], errors)
    value, error = torch.from_numpy(found)
    negatives, positives = torch.from_numpy(sizes).reshape(-1, 2).T
    return value, error, positives, negatives


class _Side(NamedTuple):
    """Scores of one group and label, ascending; their weights and the weight below each place, [n + 1] (None: 1 each)."""

    scores: NDArray[Any]
    total: np.float64
    weight: NDArray[np.float64] | None = None
    before: NDArray[np.float64] | None = None


def _side(scores: NDArray[Any], weight: NDArray[np.float64] | None = None) -> _Side:
    if weight is None:
        scores.sort()
        return _Side(scores, np.float64(len(scores)))
    order = np.argsort(scores)
    before = np.append(0.0, weight[order].cumsum())
    return _Side(scores[order], before[-1], weight[order], before)


def _below(side: _Side, other: _Side) -> NDArray[np.float64]:
    """Return the weight of the other side's scores below each of these, ties counted half."""
    low = np.searchsorted(other.scores, side.scores)
    below = low.astype(np.float64) if other.before is None else other.before[low]
    tied = (other.scores.take(low, mode="clip") == side.scores).nonzero()[0]
    if len(tied):
        high = np.searchsorted(other.scores, side.scores[tied], side="right")
        below[tied] += high if other.before is None else other.before[high]
        below[tied] /= 2
    return below


def _one_auc(negatives: _Side, positives: _Side, errors: bool = False) -> tuple[float, float]:
    """Return the AUC and, where asked for, its standard error."""
    if not negatives.total or not positives.total:
        return np.nan, np.nan
    below = _below(positives, negatives)
    won = below.sum() if positives.weight is None else below @ positives.weight
    value = won / (positives.total * negatives.total)
    if not errors:
        return float(value), np.nan
    above = positives.total - _below(negatives, positives)
    among = _variance(positives, below / negatives.total - value), _variance(negatives, above / positives.total - value)
    return float(value), float(np.sqrt(sum(among)))


def _variance(side: _Side, off: NDArray[np.float64]) -> float:
    if side.weight is None:
        return float(off @ off) / (len(off) * (len(off) - 1)) if len(off) > 1 else np.nan
    return float(((off * side.weight) ** 2).sum() / side.total**2)


def _f1(p: Tensor, y: Tensor) -> Tensor:
    chosen = p > 0.5
    hits = 2 * (chosen & y).sum().double()
    return hits / (hits + (chosen != y).sum())


def _log_loss(p: Tensor, y: Tensor) -> Tensor:
    inside = p.double().clamp(_EPS, 1 - _EPS)
    return -torch.where(y, inside.log(), (-inside).log1p()).mean()


def _macro_f1(p: Tensor, y: Tensor) -> Tensor:
    classes = torch.arange(p.shape[1], device=p.device)
    chosen, truth = p.argmax(1, keepdim=True) == classes, y[:, None] == classes
    return (2 * (chosen & truth).sum(0).double() / (chosen.sum(0) + truth.sum(0))).nanmean()


def _class_brier(p: Tensor, y: Tensor) -> Tensor:
    one_hot = y[:, None] == torch.arange(p.shape[1], device=p.device)
    return (p.double() - one_hot.double()).square().sum(1).mean()


def _r2(p: Tensor, y: Tensor) -> Tensor:
    spread = (y - y.mean()).square().mean()
    return torch.where(spread > 0, 1 - (p - y).square().mean() / spread, torch.nan)


def _ccc(p: Tensor, y: Tensor) -> Tensor:
    dp, dy = p - p.mean(), y - y.mean()
    return 2 * (dp * dy).mean() / (dy.square().mean() + dp.square().mean() + (p.mean() - y.mean()).square())


Score = Callable[[Tensor, Tensor], Tensor]
_BINARY: Mapping[str, Score] = {
    "auc": auc,
    "accuracy": lambda p, y: ((p > 0.5) == y).double().mean(),
    "brier": lambda p, y: (p.double() - y.double()).square().mean(),
    "log_loss": _log_loss,
    "f1": _f1,
}
SCORES: Mapping[str, Mapping[str, Score]] = {
    "binary": _BINARY,
    "multilabel": _BINARY,
    "multiclass": {
        "auc": lambda p, y: torch.stack([auc(p[:, c], y == c) for c in range(p.shape[1])]).nanmean(),
        "accuracy": lambda p, y: (p.argmax(1) == y).double().mean(),
        "brier": _class_brier,
        "log_loss": lambda p, y: -p.double().gather(1, y[:, None]).clamp(_EPS, 1).log().mean(),
        "macro_f1": _macro_f1,
    },
    "regression": {
        "mae": lambda p, y: (p - y).abs().mean(),
        "rmse": lambda p, y: (p - y).square().mean().sqrt(),
        "r2": _r2,
        "ccc": _ccc,
    },
}
"""Kind of task -> name -> score of probabilities (or values) and observed truth: bool, class, or a number."""


def task_scores(
    kind: str,
    values: Tensor,
    labels: Tensor,
    names: Iterable[str] | None = None,
    native: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Scores of a task over observed labels, by name; NaN where the labels do not define one.

    Binary: auc, accuracy, brier, log_loss, f1. Multiclass: auc (macro one-vs-rest), accuracy, brier, log_loss, macro_f1.
    Multilabel: means over labels of the binary ones. Regression: mae, rmse, r2, ccc, in native units (``native``: mean and std).
    ``values`` are probabilities or predicted values, [N] or [N, C]; ``labels`` NaN (float) or -100 (integer) where missing.

    >>> task_scores("binary", torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1.0, 0.0, torch.nan]), ["auc", "accuracy"])
    {'auc': 1.0, 'accuracy': 1.0}
    """
    known = SCORES[kind]
    seen = labels.isfinite() if labels.is_floating_point() else labels != _MISSING
    if kind == "multilabel":
        columns = [(values[s, c], labels[s, c] > 0.5) for c, s in enumerate(seen.unbind(1))]
        return {n: float(torch.stack([known[n](*column) for column in columns]).nanmean()) for n in names or known}
    p, y = values[seen], labels[seen]
    if kind == "regression":
        p, y = (part.double() * native[1] + native[0] for part in (p, y))
    else:
        y = y > 0.5 if kind == "binary" else y.long()
    return {name: float(known[name](p, y)) for name in names or known}
