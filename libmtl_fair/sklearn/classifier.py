"""FairMTLClassifier: one binary or multiclass target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from libmtl_fair.errors import DataError
from libmtl_fair.predictions import Predictions
from libmtl_fair.sklearn.base import FairMTLBase
from libmtl_fair.sklearn.inputs import check_inputs


class FairMTLClassifier(ClassifierMixin, FairMTLBase):  # type: ignore[misc]
    """A fair network for one binary or multiclass target, as a scikit-learn classifier.

    Works in pipelines, ``cross_validate``, ``GridSearchCV`` and under fairlearn's
    ``ThresholdOptimizer(estimator, prefit=True, predict_method="predict_proba")``.

    Parameters
    ----------
    method : ``"none"`` (plain, the baseline), ``"fairmt"``, ``"glf"``, ``"gld"``, ``"adversarial"``, ``"bgl"``, ``"dpl"``,
        ``"fprl"``, ``"tprl"``, or a LibMTL weighting. ``"relif"`` and ``"fairbranch"`` compare tasks with each other and
        are refused here: they need :class:`FairMTLEstimator` and two targets.
    epochs, batch_size, lr, weight_decay : of training with Adam.
    hidden, dropout : widths of the hidden layers and dropout between them.
    method_args : settings of the method, as in recipes: ``{"epsilon": 0.02}``.
    validation_fraction : share of the rows held out to choose the best epoch; 0 keeps the last epoch.
    device : ``"auto"``, ``"cpu"``, ``"cuda:0"``, ...
    random_state : None, an int or a ``numpy.random.RandomState``.

    Attributes
    ----------
    classes_ : the classes, sorted. ``history_``: one row a training step. ``groups_``: attribute -> names of its groups.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, sex = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
    >>> y = (X[:, 0] + 0.5 * sex > 0).astype(int)
    >>> model = FairMTLClassifier("fairmt", epochs=2, random_state=0).fit(X, y, sensitive_features=sex)
    >>> model.predict_proba(X).shape
    (200, 2)
    """

    def fit(self, X: Any, y: Any, *, sensitive_features: Any = None, sample_weight: Any = None) -> FairMTLClassifier:
        """Train on rows X [N, F] with classes y [N].

        Parameters
        ----------
        X : array or DataFrame; text and category columns are one-hot encoded, gaps are filled.
        y : binary or multiclass labels without gaps.
        sensitive_features : groups, one column or a table of them, missing values allowed; most methods need them.
        sample_weight : [N] of at least 0: how much a row counts, in losses and in the methods' group statistics. Each epoch
            draws rows in proportion to it (see :class:`~libmtl_fair.data.ResidentLoader`), so a weight of 2 is as good as a
            row given twice only in the mean over epochs; a weight of 0 leaves the row out.

        Raises
        ------
        RecipeError : unknown method, or a parameter out of range.
        DataError : a method that needs groups got none, or rows do not fit.
        """
        if y is None:
            raise ValueError("FairMTLClassifier requires y to be passed, but the target y is None")
        x = check_inputs(self, X, reset=True)
        name = getattr(y, "name", None)
        labels = column_or_1d(y, warn=True)
        if pd.isna(labels).any() or (labels.dtype.kind == "f" and np.isinf(labels).any()):
            raise DataError(
                "Input y contains NaN or infinity; a classifier's labels must be known (see FairMTLEstimator)"
            )
        check_classification_targets(labels)
        frame = pd.DataFrame({"y" if name is None else name: labels})
        n_classes = frame.iloc[:, 0].nunique()
        kind = "binary" if n_classes <= 2 else "multiclass"
        self._fit(x, frame, sensitive_features, {frame.columns[0]: kind}, sample_weight)
        self._publish()
        return self

    def _publish(self) -> None:
        found = self.targets_[0].classes
        assert found is not None
        self.classes_ = np.array(found.tolist()) if found.dtype == object else found

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return probabilities [N, C], columns as in ``classes_``."""
        check_is_fitted(self)
        target = self.targets_[0]
        return target.probabilities(self._outputs(X)[target.name])

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class [N]."""
        check_is_fitted(self)
        found: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return found

    def predictions(self, X: Any, y: Any = None, *, sensitive_features: Any = None) -> Predictions:
        """Return outputs, scores, labels and groups for this package's own audit, metrics and ``metric_frame``."""
        check_is_fitted(self)
        frame = None if y is None else pd.DataFrame({self.targets_[0].column: np.asarray(y)})
        return self._predictions(X, frame, sensitive_features)
