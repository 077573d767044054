"""FairMTLEstimator: several targets of any kind, with missing labels; FairMTLClassifier: one binary or multiclass target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils import ClassifierTags, Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from libmtl_fair.data.frames import Series, Values
from libmtl_fair.errors import DataError
from libmtl_fair.predictions import Predictions
from libmtl_fair.sklearn.base import FairMTLBase
from libmtl_fair.sklearn.inputs import check_inputs, check_weights
from libmtl_fair.sklearn.targets import Declared, Target, read_table


class FairMTLClassifier(ClassifierMixin, FairMTLBase):  # type: ignore[misc]
    """A fair network for one binary or multiclass target, as a scikit-learn classifier.

    Works in pipelines, ``cross_validate``, ``GridSearchCV`` and under fairlearn's
    ``ThresholdOptimizer(estimator, prefit=True, predict_method="predict_proba")``.

    Parameters
    ----------
    method : str
        ``"none"`` (plain, the baseline), ``"relif"`` (near people, by X without the columns that tell
        ``sensitive_features``), ``"fairmt"``, ``"glf"``, ``"gld"``, ``"adversarial"``, ``"bgl"``, ``"dpl"``,
        ``"fprl"``, ``"tprl"``, or a LibMTL weighting. ``"fairbranch"`` compares tasks with each other and is refused
        here: it needs :class:`FairMTLEstimator` and two targets.
    epochs, batch_size, lr, weight_decay : int, int, float, float, default 30, 128, 0.003, 1e-05
        Of training with Adam.
    hidden, dropout : tuple of int = (64, 32), float = 0.0
        Widths of the hidden layers and dropout between them.
    method_args : mapping of str to object, optional
        Settings of the method, as in recipes: ``{"target": "eo <= 0.05"}``.
    encoder : class or callable, optional
        Called with the number of encoded columns F it returns a module [N, F] -> [N, d], in place of the network of
        ``hidden`` and ``dropout``.
    validation_fraction : float, default 0.0
        Share of the rows held out to choose the best epoch; 0 keeps the last epoch.
    early_stopping : int, optional
        Training stops after so many epochs without a better one on the rows held out.
    device : str, default "auto"
        ``"auto"``, ``"cpu"``, ``"cuda:0"``, ...
    random_state : int or numpy.random.RandomState, optional
        Of initial weights and batches.

    Notes
    -----
    ``transform`` gives the representations [N, d] and follows ``set_output``. A sparse X is trained on as a dense one.
    ``skops.io.dump`` takes a fitted estimator; to load one, name the estimator's own class as trusted (and an ``encoder`` of yours).

    Attributes
    ----------
    classes_ : ndarray
        The classes, sorted.
    history_ : DataFrame
        One row a training step.
    groups_ : dict of str to list of str
        Attribute -> names of its groups.
    constraint_ : DataFrame
        After ``fit`` with ``"fairmt"``, a row a constraint: what was tolerated, what training reached, and whether it
        is met.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, sex = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
    >>> y = (X[:, 0] + 0.5 * sex > 0).astype(int)
    >>> model = FairMTLClassifier("fairmt", epochs=2, random_state=0).fit(X, y, sensitive_features=sex)
    >>> model.predict_proba(X).shape
    (200, 2)
    """

    def fit(self, X: object, y: object, *, sensitive_features: object = None, sample_weight: object = None) -> Self:
        """Train on rows X [N, F] with classes y [N].

        Parameters
        ----------
        X : array or DataFrame
            Text and category columns are one-hot encoded, gaps are filled.
        y : array or Series
            Binary or multiclass labels without gaps.
        sensitive_features : array, Series or DataFrame, optional
            Groups, one column or a table of them, missing values allowed; most methods need them. More than ten numbers, or
            dates, are refused: bin them (``pd.cut``).
        sample_weight : array, optional
            [N] of at least 0: how much a row counts, in losses and in the methods' group statistics. Each epoch draws
            rows in proportion to it (see :class:`~libmtl_fair.data.ResidentLoader`), so a weight of 2 is as good as a
            row given twice only in the mean over epochs; a weight of 0 leaves the row out.

        Raises
        ------
        RecipeError
            Unknown method, or a parameter out of range.
        DataError
            A method that needs groups got none, or rows do not fit.
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
        kind = "binary" if frame.iloc[:, 0].nunique() <= 2 else "multiclass"
        self._fit(x, frame, sensitive_features, {frame.columns[0]: kind}, sample_weight)
        self._publish()
        return self

    def _publish(self) -> None:
        found = self.targets_[0].classes
        assert found is not None
        self.classes_ = np.array(found.tolist()) if found.dtype == object else found

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """Return probabilities [N, C], columns as in ``classes_``."""
        found = self._outputs(X)
        return self.targets_[0].probabilities(found[self.targets_[0].name])

    def predict(self, X: object) -> Values:
        """Return the most probable class [N]."""
        chosen = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[chosen])

    def predictions(self, X: object, y: object = None, *, sensitive_features: object = None) -> Predictions:
        """Return outputs, scores, labels and groups for this package's own audit, metrics and ``metric_frame``."""
        check_is_fitted(self)
        frame = None if y is None else pd.DataFrame({self.targets_[0].column: np.asarray(y)})
        return self._predictions(X, frame, sensitive_features)


@dataclass(kw_only=True, eq=False, repr=False)
class FairMTLEstimator(FairMTLBase):
    """A fair multi-task network for a table of targets of mixed kinds with missing labels.

    Parameters
    ----------
    method : str
        ``"none"`` (plain, the baseline), ``"relif"``, ``"fairmt"``, ``"fairbranch"``, ``"glf"``, ``"gld"``,
        ``"adversarial"``, ``"bgl"``, ``"dpl"``, ``"fprl"``, ``"tprl"``, or a LibMTL weighting such as ``"GradNorm"``.
        FairBranch compares tasks: Y needs two columns or more. ReLiF compares near people by X without the columns that
        tell ``sensitive_features``: give these, or X without them.
    tasks : Declared, optional
        ``{column: "binary" | "multiclass" | "regression"}`` where it is not to be told from the values. Without it:
        text, categories and booleans are classes, two values are binary, up to 20 different integers are classes, other
        numbers are regression targets.
    epochs, batch_size, lr, weight_decay, hidden, dropout, method_args, encoder, validation_fraction : as there
        As for :class:`FairMTLClassifier`.
    early_stopping, device, random_state : as there
        As for :class:`FairMTLClassifier`.

    Attributes
    ----------
    targets_ : list of Target
        One a column of Y, with kind and classes.
    history_ : DataFrame
        One row a training step.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 3))
    >>> Y = pd.DataFrame({"ill": X[:, 0] > 0, "days": 10 + 3 * X[:, 1]})
    >>> Y.loc[:20, "days"] = np.nan
    >>> model = FairMTLEstimator("relif", epochs=2, random_state=0).fit(X, Y)
    >>> model.predict(X).dtypes.astype(str).to_dict()
    {'ill': 'bool', 'days': 'float64'}
    """

    tasks: Declared | None = None

    def __sklearn_tags__(self) -> Tags:
        """Say that Y may have several columns, of classes too."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output, tags.classifier_tags = True, ClassifierTags()
        return tags

    def fit(
        self,
        X: object,
        Y: object = None,
        *,
        sensitive_features: object = None,
        sample_weight: object = None,
        y: object = None,
    ) -> Self:
        """Train on rows X [N, F] with targets Y.

        Parameters
        ----------
        X, sensitive_features, sample_weight : as there
            As for :meth:`FairMTLClassifier.fit`.
        Y : DataFrame, Series or array, optional
            One column a task; NaN, None or NA where a label is missing.
        y : DataFrame, Series or array, optional
            Another name of Y, for tools that write ``fit(X, y=...)``.

        Raises
        ------
        RecipeError
            Unknown method, too few tasks for it, or a parameter out of range.
        DataError
            A method that needs groups got none, or a target whose kind cannot be told.
        """
        if Y is not None and y is not None:
            raise DataError("fit got both Y and y, which are two names of the same table; give one")
        Y = y if Y is None else Y
        if Y is None:
            raise ValueError("FairMTLEstimator requires y to be passed, but the target y is None")
        x = check_inputs(self, X, reset=True)
        self._fit(x, read_table(Y), sensitive_features, self.tasks, sample_weight)
        self.form_ = "frame" if isinstance(Y, pd.DataFrame) else "column" if np.asarray(Y).ndim == 1 else "array"
        return self

    def predict(self, X: object) -> pd.DataFrame | Values:
        """Return classes and numbers in native units, in the form of Y: DataFrame, [N, T] array, or [N] for one target."""
        found = self._outputs(X)
        columns = {target.column: target.predict(found[target.name]) for target in self.targets_}
        if self.form_ == "frame":
            return pd.DataFrame(columns)
        values = list(columns.values())
        return values[0] if self.form_ == "column" else np.column_stack(values)

    def predict_proba(self, X: object) -> pd.DataFrame | NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return probabilities of the classification targets.

        For a DataFrame Y: a DataFrame with columns (target, class). For an array Y: a list with an array [N, C] per
        classification target, as scikit-learn's multi-output classifiers do; for a 1-D Y its array.

        Raises
        ------
        DataError
            There is no classification target.
        """
        check_is_fitted(self)
        chosen = [(target, target.classes) for target in self.targets_ if target.classes is not None]
        if not chosen:
            raise DataError("predict_proba needs a classification target; all of these are regression targets")
        found = self._outputs(X)
        blocks = [target.probabilities(found[target.name]) for target, _ in chosen]
        if self.form_ == "frame":
            columns = [(target.column, value) for target, classes in chosen for value in classes.tolist()]
            index = pd.MultiIndex.from_tuples(columns, names=["target", "class"])
            return pd.DataFrame(np.hstack(blocks), columns=index)
        return blocks[0] if self.form_ == "column" else blocks

    def score(self, X: object, y: object, sample_weight: object = None) -> float:
        """Return the mean over targets of accuracy (classes) or R2 (numbers), over the labels that there are.

        ``sample_weight`` [N] weighs the rows. NaN where no target has a label.
        """
        found, frame = self._outputs(X), self._truth(y)
        check_consistent_length(frame, next(iter(found.values())), sample_weight)
        weights = check_weights(sample_weight, frame)
        scores = [_score(t, frame[t.column], t.predict(found[t.name]), weights) for t in self.targets_]
        known = [value for value in scores if value == value]
        return float(np.mean(known)) if known else float("nan")

    def predictions(self, X: object, Y: object = None, *, sensitive_features: object = None) -> Predictions:
        """Return outputs, scores, labels and groups for this package's own audit, metrics and ``metric_frame``."""
        check_is_fitted(self)
        return self._predictions(X, None if Y is None else self._truth(Y), sensitive_features)

    def _truth(self, y: object) -> pd.DataFrame:
        check_is_fitted(self)
        frame, columns = read_table(y), [target.column for target in self.targets_]
        if not isinstance(y, pd.DataFrame) and frame.shape[1] == len(columns):
            frame = frame.set_axis(columns, axis=1)
        missing = [column for column in columns if column not in frame]
        if missing:
            raise DataError(f"Y lacks the target {missing[0]!r} that fit saw; it has {list(frame.columns)}")
        return frame


def _score(target: Target, truth: Series, found: Values, weights: NDArray[np.float64] | None) -> float:
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
