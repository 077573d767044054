"""FairMTLEstimator: several targets of any kind, with missing labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from libmtl_fair.errors import DataError
from libmtl_fair.predictions import Predictions
from libmtl_fair.sklearn.base import FairMTLBase
from libmtl_fair.sklearn.inputs import check_inputs, check_weights
from libmtl_fair.sklearn.targets import Target, read_table


class FairMTLEstimator(FairMTLBase):
    """A fair multi-task network for a table of targets of mixed kinds with missing labels.

    Parameters
    ----------
    method : ``"none"`` (plain, the baseline), ``"relif"``, ``"fairmt"``, ``"fairbranch"``, ``"glf"``, ``"gld"``,
        ``"adversarial"``, ``"bgl"``, ``"dpl"``, ``"fprl"``, ``"tprl"``, or a LibMTL weighting such as ``"GradNorm"``.
        ReLiF and FairBranch compare tasks: Y needs two columns or more.
    tasks : ``{column: "binary" | "multiclass" | "regression"}`` where it is not to be told from the values. Without it:
        text, categories and booleans are classes, two values are binary, up to 20 different integers are classes,
        other numbers are regression targets.
    epochs, batch_size, lr, weight_decay, hidden, dropout, method_args, validation_fraction, device, random_state :
        as for :class:`FairMTLClassifier`.

    Attributes
    ----------
    targets_ : one a column of Y, with kind and classes. ``history_``: one row a training step.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 3))
    >>> Y = pd.DataFrame({"ill": X[:, 0] > 0, "days": 10 + 3 * X[:, 1]})
    >>> Y.loc[:20, "days"] = np.nan
    >>> model = FairMTLEstimator("relif", epochs=2, random_state=0).fit(X, Y)
    >>> model.predict(X).dtypes.astype(str).to_dict()
    {'ill': 'bool', 'days': 'float64'}
    """

    def __init__(
        self,
        method: str = "none",
        *,
        tasks: Mapping[Any, str] | None = None,
        epochs: int = 30,
        batch_size: int = 128,
        hidden: tuple[int, ...] = (64, 32),
        dropout: float = 0.0,
        lr: float = 3e-3,
        weight_decay: float = 1e-5,
        method_args: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.0,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            method,
            epochs=epochs,
            batch_size=batch_size,
            hidden=hidden,
            dropout=dropout,
            lr=lr,
            weight_decay=weight_decay,
            method_args=method_args,
            validation_fraction=validation_fraction,
            device=device,
            random_state=random_state,
        )
        self.tasks = tasks

    def __sklearn_tags__(self) -> Any:
        """Say that Y may have several columns."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(
        self, X: Any, Y: Any = None, *, sensitive_features: Any = None, sample_weight: Any = None, y: Any = None
    ) -> FairMTLEstimator:
        """Train on rows X [N, F] with targets Y.

        Parameters
        ----------
        X : array or DataFrame; text and category columns are one-hot encoded, gaps are filled.
        Y : DataFrame (one column a task), Series or array; NaN, None or NA where a label is missing.
        sensitive_features : groups, one column or a table of them, missing values allowed; most methods need them.
        sample_weight : [N] of at least 0: how much a row counts, in losses and in the methods' group statistics. Each epoch
            draws rows in proportion to it (see :class:`~libmtl_fair.data.ResidentLoader`), so a weight of 2 is as good as a
            row given twice only in the mean over epochs; a weight of 0 leaves the row out.
        y : another name of Y, for tools that write ``fit(X, y=...)``.

        Raises
        ------
        RecipeError : unknown method, too few tasks for it, or a parameter out of range.
        DataError : a method that needs groups got none, or a target whose kind cannot be told.
        """
        if Y is not None and y is not None:
            raise DataError("fit got both Y and y, which are two names of the same table; give one")
        Y = y if Y is None else Y
        if Y is None:
            raise ValueError("FairMTLEstimator requires y to be passed, but the target y is None")
        x = check_inputs(self, X, reset=True)
        frame = read_table(Y)
        self._fit(x, frame, sensitive_features, self.tasks, sample_weight)
        self.form_ = _form(Y)
        return self

    def predict(self, X: Any) -> Any:
        """Return classes and numbers in native units, in the form of Y: DataFrame, [N, T] array, or [N] for one target."""
        found = self._outputs(X)
        columns = {target.column: target.predict(found[target.name]) for target in self.targets_}
        return _shaped(columns, self.form_)

    def predict_proba(self, X: Any) -> Any:
        """Return probabilities of the classification targets.

        For a DataFrame Y: a DataFrame with columns (target, class). For an array Y: a list with an array [N, C] per
        classification target, as scikit-learn's multi-output classifiers do; for a 1-D Y its array.

        Raises
        ------
        DataError : there is no classification target.
        """
        check_is_fitted(self)
        chosen = [target for target in self.targets_ if target.classes is not None]
        if not chosen:
            raise DataError("predict_proba needs a classification target; all of these are regression targets")
        found = self._outputs(X)
        blocks = [target.probabilities(found[target.name]) for target in chosen]
        if self.form_ == "frame":
            columns = [(target.column, value) for target in chosen for value in _classes(target)]
            return pd.DataFrame(
                np.hstack(blocks), columns=pd.MultiIndex.from_tuples(columns, names=["target", "class"])
            )
        return blocks[0] if self.form_ == "column" else blocks

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the mean over targets of accuracy (classes) or R2 (numbers), over the labels that there are.

        ``sample_weight`` [N] weighs the rows. NaN where no target has a label.
        """
        found, frame = self._outputs(X), self._truth(y)
        check_consistent_length(frame, next(iter(found.values())), sample_weight)
        weights = check_weights(sample_weight, frame)
        scores = [_score(t, frame[t.column], t.predict(found[t.name]), weights) for t in self.targets_]
        known = [value for value in scores if value == value]
        return float(np.mean(known)) if known else float("nan")

    def predictions(self, X: Any, Y: Any = None, *, sensitive_features: Any = None) -> Predictions:
        """Return outputs, scores, labels and groups for this package's own audit, metrics and ``metric_frame``."""
        check_is_fitted(self)
        return self._predictions(X, None if Y is None else self._truth(Y), sensitive_features)

    def _truth(self, y: Any) -> pd.DataFrame:
        check_is_fitted(self)
        frame, columns = read_table(y), [target.column for target in self.targets_]
        if not isinstance(y, pd.DataFrame) and frame.shape[1] == len(columns):
            frame = frame.set_axis(columns, axis=1)
        missing = [column for column in columns if column not in frame]
        if missing:
            raise DataError(f"Y lacks the target {missing[0]!r} that fit saw; it has {list(frame.columns)}")
        return frame


def _form(y: Any) -> str:
    if isinstance(y, pd.DataFrame):
        return "frame"
    return "column" if np.asarray(y).ndim == 1 else "array"


def _shaped(columns: dict[Any, NDArray[Any]], form: str) -> Any:
    if form == "frame":
        return pd.DataFrame(columns)
    values = list(columns.values())
    return values[0] if form == "column" else np.column_stack(values)


def _classes(target: Target) -> list[Any]:
    assert target.classes is not None
    return list(target.classes.tolist())


def _score(target: Target, truth: pd.Series[Any], found: NDArray[Any], weights: NDArray[np.float64] | None) -> float:
    seen = truth.notna().to_numpy()
    w = np.ones(len(truth)) if weights is None else weights
    values, guess, w = truth[seen].to_numpy(), found[seen], w[seen]
    if not w.any():
        return float("nan")
    if target.classes is not None:
        return float(np.average([a == b for a, b in zip(values.tolist(), guess.tolist())], weights=w))
    values = values.astype(np.float64)
    spread = float(w @ (values - np.average(values, weights=w)) ** 2)
    return float(1 - w @ (values - guess) ** 2 / spread) if spread > 0 else float("nan")
