"""What both estimators share: parameters, fitting, prediction, pickling, saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import Tensor

from libmtl_fair.errors import RecipeError
from libmtl_fair.predictions import Predictions
from libmtl_fair.sklearn import storage, training
from libmtl_fair.sklearn.groups import read_groups
from libmtl_fair.sklearn.inputs import check_inputs, check_weights, encode_inputs, fit_inputs
from libmtl_fair.sklearn.methods import check_method, find_method
from libmtl_fair.sklearn.targets import Target, make_targets

Self = TypeVar("Self", bound="FairMTLBase")


class FairMTLBase(BaseEstimator):  # type: ignore[misc]
    """Base of :class:`FairMTLEstimator` and :class:`FairMTLClassifier`; see there."""

    def __init__(
        self,
        method: str = "none",
        *,
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
        self.method = method
        self.epochs = epochs
        self.batch_size = batch_size
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.method_args = method_args
        self.validation_fraction = validation_fraction
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Say what scikit-learn may expect: missing values in X are allowed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        tags.non_deterministic = False
        return tags

    def _fit(
        self,
        x: Any,
        y: pd.DataFrame,
        sensitive_features: Any,
        declared: Mapping[Any, str] | None,
        sample_weight: Any = None,
    ) -> list[Target]:
        settings, method = training.Settings.of(self), find_method(self.method)
        if self.method_args is not None and not isinstance(self.method_args, Mapping):
            raise RecipeError(f"method_args must be a dict of settings of {self.method!r}, found {self.method_args!r}")
        check_consistent_length(x, y)
        groups, weights = read_groups(sensitive_features, len(y)), check_weights(sample_weight, x)
        if weights is not None and not weights.all():  # rows of weight 0 are as good as absent
            kept = np.flatnonzero(weights)
            x, y, weights = _safe_indexing(x, kept), y.iloc[kept], weights[kept]
            groups = groups.take(torch.from_numpy(kept))
        targets = make_targets(y, declared)
        check_method(self.method, method, len(targets), groups.names)
        self.encoder_, encoded = fit_inputs(x)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        labels = {target.name: target.encode(y[target.column]) for target in targets}
        tasks = [target.task for target in targets]
        rows = torch.from_numpy(encoded)
        importance = None if weights is None else torch.from_numpy(weights)
        found = training.train(settings, method, self._arguments(), rows, tasks, labels, groups, seed, importance)
        self.targets_, self.groups_, self.history_ = targets, groups.names, found.history
        self.weights_, self.structure_ = found.weights, found.structure
        self._rebuild(rows.shape[1])
        return targets

    def _arguments(self) -> dict[str, Any]:
        return dict(self.method_args or {})

    def _rebuild(self, n_columns: int) -> None:
        self.n_columns_ = n_columns
        tasks = [target.task for target in self.targets_]
        settings, method = training.Settings.of(self), find_method(self.method)
        self.model_ = training.predictor(
            settings, method, self._arguments(), n_columns, tasks, self.structure_, self.weights_
        )

    def _outputs(self, x: Any) -> dict[str, Tensor]:
        check_is_fitted(self)
        rows = encode_inputs(self.encoder_, check_inputs(self, x, reset=False))
        return training.outputs(self.model_, torch.from_numpy(rows))

    def _predictions(self, x: Any, y: pd.DataFrame | None, sensitive_features: Any) -> Predictions:
        found = {name: value.float() for name, value in self._outputs(x).items()}
        n_rows = len(next(iter(found.values())))
        groups = read_groups(sensitive_features, n_rows, self.groups_)
        tasks = tuple(target.task for target in self.targets_)
        gaps = pd.Series(np.full(n_rows, np.nan))
        labels = {t.name: t.encode(gaps if y is None else y[t.column]) for t in self.targets_}
        scores = {task.name: task.score(found[task.name]) for task in tasks}
        return Predictions(tasks, scores, found, labels, groups.ids, groups.names)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the torch model out: it is rebuilt from its weights."""
        return {name: value for name, value in super().__getstate__().items() if name != "model_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the torch model."""
        super().__setstate__(state)
        if hasattr(self, "weights_"):
            self._rebuild(self.n_columns_)

    def save(self, path: str | Path) -> Path:
        """Write the fitted estimator to one file of tensors and JSON, without pickled code.

        Raises
        ------
        CheckpointError : it cannot be written, or a parameter or class is no plain value.
        """
        check_is_fitted(self)
        return storage.save(self, Path(path))

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what :meth:`save` wrote. Nothing in the file is run.

        Raises
        ------
        CheckpointError : missing, damaged, or of another estimator.
        """
        made: Self = storage.load(cls, Path(path))
        return made
