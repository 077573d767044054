"""fairlearn's ExponentiatedGradient as plain data: weighted voters, linear or trees, which decide for new rows without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import logit
from torch import Tensor

from libmtl_fair.arrays import Array, Floats, as_floats
from libmtl_fair.files import Json
from libmtl_fair.metrics.post_models import with_outputs
from libmtl_fair.predictions import Predictions

if TYPE_CHECKING:
    from fairlearn.reductions import ExponentiatedGradient

"""One predictor of a reduction: its ``weight``, and ``linear`` [F + 1], ``constant`` or ``trees``."""
_MOMENTS = {
    "true_positive_rate_parity": "TruePositiveRateParity",
    "false_positive_rate_parity": "FalsePositiveRateParity",
    "equalized_odds": "EqualizedOdds",
    "demographic_parity": "DemographicParity",
    "error_rate_parity": "ErrorRateParity",
}
_NODE = ("feature_idx", "num_threshold", "left", "right", "is_leaf", "value")


def reduction(constraint: str, estimator: str, seed: int, *, eps: float, max_iter: int) -> ExponentiatedGradient:
    """Return the unfitted ``ExponentiatedGradient``."""
    from fairlearn import reductions
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    moment = getattr(reductions, _MOMENTS[constraint])(difference_bound=eps)
    base = {
        "logistic": partial(LogisticRegression, max_iter=1000),
        "boosting": partial(HistGradientBoostingClassifier, random_state=seed),
    }
    return reductions.ExponentiatedGradient(base[estimator](), moment, eps=eps, max_iter=max_iter)


def voters_of(model: ExponentiatedGradient) -> list[Json]:
    """Return the predictors of a fitted reduction that have a weight, as plain data."""
    used = [(float(w), predictor) for w, predictor in zip(model.weights_, model.predictors_) if w > 0]
    return [{"weight": weight, **_voter(predictor)} for weight, predictor in used]


def _voter(predictor: Any) -> Json:
    if hasattr(predictor, "coef_"):
        return {"linear": [*predictor.coef_[0].tolist(), float(predictor.intercept_[0])]}
    if hasattr(predictor, "constant_"):  # scikit-learn's dummy, which fairlearn takes where all labels are alike
        return {"constant": float(predictor.predict(np.zeros((1, 1)))[0])}
    trees = [{name: each[0].nodes[name].tolist() for name in _NODE} for each in predictor._predictors]
    return {"trees": trees, "baseline": float(predictor._baseline_prediction.ravel()[0])}


def votes(voter: Json, x: Array) -> Floats:
    """Return a voter's decisions 0/1 on encoded rows [N, F], float64 [N]."""
    if "constant" in voter:
        return np.full(len(x), float(voter["constant"]))
    if "linear" in voter:
        weights = np.asarray(voter["linear"], dtype=np.float64)
        return as_floats(x @ weights[:-1] + weights[-1] > 0)
    raw = np.full(len(x), float(voter["baseline"]))
    for tree in voter["trees"]:
        raw += _grown(tree, x)
    return as_floats(raw > 0)


def _grown(tree: Mapping[str, Sequence[float]], x: Array) -> Floats:
    """Return the value of the leaf that each row ends in."""
    feature, left, right = (np.asarray(tree[name], dtype=np.int64) for name in ("feature_idx", "left", "right"))
    threshold, value = (np.asarray(tree[name], dtype=np.float64) for name in ("num_threshold", "value"))
    at, rows, leaf = np.zeros(len(x), dtype=np.int64), np.arange(len(x)), np.asarray(tree["is_leaf"], dtype=bool)
    while not leaf[at].all():
        down = np.where(x[rows, feature[at]] <= threshold[at], left[at], right[at])
        at = np.where(leaf[at], at, down)
    return as_floats(value[at])


def decided_by(voters: Mapping[str, Sequence[Json]], predictions: Predictions, x: Tensor) -> Predictions:
    """Return the predictions with the expected decision of a task's voters, weighted, as its score; other tasks stay."""
    rows, outputs = x.numpy().astype(np.float64), {}
    for task, every in voters.items():
        expected = np.sum([voter["weight"] * votes(voter, rows) for voter in every], axis=0)
        outputs[task] = torch.as_tensor(logit(np.clip(expected, 1e-6, 1 - 1e-6)), dtype=torch.float64)
    return with_outputs(predictions, outputs)
