"""What both estimators share: parameters, fitting, prediction, pickling, and files of tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, _safe_indexing, check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import Tensor, nn

from libmtl_fair.data.features import FeatureEncoder
from libmtl_fair.data.loader import ResidentLoader, representative
from libmtl_fair.data.reference import fit_reference
from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.files import Json
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.libmtl.state import RepresentationHook
from libmtl_fair.libmtl.trainer import FairTrainer
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import EVAL_BATCH, build_trainer
from libmtl_fair.recipe.sections import Model, Optimizer, Train
from libmtl_fair.sklearn.inputs import Groups, Rows, check_inputs, check_weights, encode_inputs, fit_inputs, read_groups
from libmtl_fair.sklearn.methods import Method, check_method, find_method
from libmtl_fair.sklearn.targets import Declared, Target, make_targets

_KIND = "libmtl_fair estimator"
_SAVED = ("groups_", "structure_", "n_columns_", "n_features_in_", "feature_names_in_", "form_")
"""Attributes that a file holds under their names without the last underscore."""


@dataclass(kw_only=True, eq=False, repr=False)
class FairMTLBase(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Base of :class:`FairMTLEstimator` and :class:`FairMTLClassifier`; see there."""

    method: str = field(default="none", kw_only=False)
    epochs: int = 30
    batch_size: int = 128
    hidden: tuple[int, ...] = (64, 32)
    dropout: float = 0.0
    lr: float = 3e-3
    weight_decay: float = 1e-5
    method_args: Mapping[str, object] | None = None
    encoder: Callable[[int], nn.Module] | None = None
    validation_fraction: float = 0.0
    early_stopping: int | None = None
    device: str = "auto"
    random_state: int | np.random.RandomState | None = None

    def __sklearn_tags__(self) -> Tags:
        """Say what scikit-learn may expect: missing values in X are allowed, and sparse ones."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.sparse = tags.target_tags.required = True
        return tags

    def _checked(self) -> Method:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise RecipeError(f"{name} must be a whole number of at least 1, found {value!r}")
        if not 0 <= self.validation_fraction < 1:
            raise RecipeError(f"validation_fraction must be in [0, 1), found {self.validation_fraction!r}")
        stop = self.early_stopping
        if stop is not None and (isinstance(stop, bool) or not hasattr(stop, "__index__") or stop < 1):
            raise RecipeError(f"early_stopping must be a whole number of epochs, at least 1, or None, found {stop!r}")
        if stop is not None and not self.validation_fraction:
            raise RecipeError("early_stopping looks at held-out rows: give validation_fraction too, such as 0.2")
        if self.encoder is not None and not callable(self.encoder):
            raise RecipeError(f"encoder must be a class or function of the number of columns, found {self.encoder!r}")
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Sequence):
            raise RecipeError(f"hidden must be a tuple of widths, such as (64, 32), found {self.hidden!r}")
        method = find_method(self.method)
        if self.method_args is not None and not isinstance(self.method_args, Mapping):
            raise RecipeError(f"method_args must be a dict of settings of {self.method!r}, found {self.method_args!r}")
        return method

    def _fit(
        self, x: Rows, y: pd.DataFrame, sensitive_features: object, declared: Declared | None, sample_weight: object
    ) -> None:
        method = self._checked()
        check_consistent_length(x, y)
        groups, weights = read_groups(sensitive_features, len(y)), check_weights(sample_weight, x)
        if weights is not None and not weights.all():  # rows of weight 0 are as good as absent
            kept = np.flatnonzero(weights)
            x, y, weights = _safe_indexing(x, kept), y.iloc[kept], weights[kept]
            groups = groups.take(torch.from_numpy(kept))
        self.targets_, self.groups_ = make_targets(y, declared), groups.names
        check_method(self.method, method, len(self.targets_), groups.names)
        self.encoder_, encoded = fit_inputs(x)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        labels = {target.name: target.encode(y[target.column]) for target in self.targets_}
        rows = torch.from_numpy(encoded)
        self.n_columns_ = rows.shape[1]
        importance = None if weights is None else torch.from_numpy(weights)
        with checkpoint.random_state_kept():
            trainer = self._trainer(method, seed)
            self._train(trainer, rows, labels, groups, seed, importance)
        structure = getattr(trainer.model, "structure", None)
        self.structure_, self.history_ = structure and structure(), trainer.history
        self.weights_, self.constraint_ = trainer.model.state_dict(), trainer.model.constraint_rows()
        self._rebuild()

    def _trainer(self, method: Method, seed: int | None) -> FairTrainer:
        """Return the trainer of the method or, without a seed, the plain one of the main tasks that predicts."""
        weight_args, arch_args, heads = method.arguments(self.method_args or {})
        widths = tuple(int(width) for width in self.hidden)
        optimizer = Optimizer.model_construct(lr=float(self.lr), weight_decay=float(self.weight_decay))
        architecture = {"architecture": method.architecture, "arch_args": arch_args}
        stop = None if self.early_stopping is None else int(self.early_stopping)
        options = {"heads": heads, "weight_args": weight_args, "device": self.device, "patience": stop}
        return build_trainer(
            "EW" if seed is None else method.weighting,
            Model.model_construct(None, hidden=widths, dropout=self.dropout, **architecture),
            Train.model_construct(optimizer=optimizer, select="best" if self.validation_fraction > 0 else "last"),
            [target.task for target in self.targets_],
            (self.n_columns_,),
            self.groups_,
            seed,
            progress=False,
            encoder=self.encoder,
            **({"device": "cpu"} if seed is None else options),
        )

    def _train(
        self,
        trainer: FairTrainer,
        x: Tensor,
        labels: dict[str, Tensor],
        groups: Groups,
        seed: int,
        weights: Tensor | None,
    ) -> None:
        known = {name: ids.numpy() for name, ids in groups.ids.items()}
        reference = fit_reference(self.encoder_, x.numpy(), known)

        def loader(rows: Tensor, **options: Any) -> ResidentLoader:
            options |= {"reference": reference, "group_names": groups.names}
            taken, own = groups.take(rows), {name: values[rows] for name, values in labels.items()}
            return ResidentLoader(x[rows], own, taken.ids, device=self.device, **options)

        held_out = int(len(x) * self.validation_fraction)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator) if held_out else torch.arange(len(x))
        rows, judged = order[held_out:], order[:held_out]
        if weights is not None and held_out:
            judged = judged[representative(weights[judged])]
        importance = None if weights is None else weights[rows]
        trainer.train(
            loader(rows, batch_size=int(self.batch_size), shuffle=True, seed=seed, weights=importance),
            None,
            int(self.epochs),
            loader(judged, batch_size=EVAL_BATCH, shuffle=False) if held_out else None,
        )

    def _rebuild(self) -> None:
        """Make the model of the main tasks, in float64 on the CPU, so that no prediction depends on its batch."""
        with checkpoint.random_state_kept():
            self.model_ = self._trainer(self._checked(), None).model
        if self.structure_ is not None:
            self.model_.restore_structure(self.structure_)
        names = self.model_.state_dict()
        self.weights_ = {name: self.weights_[name].detach().cpu().clone() for name in names}
        self.model_.load_state_dict(self.weights_)
        self.model_.double().eval()

    @torch.no_grad()
    def _outputs(self, x: object) -> dict[str, Tensor]:
        """Return task -> raw outputs of all rows."""
        check_is_fitted(self)
        rows = torch.from_numpy(encode_inputs(self.encoder_, check_inputs(self, x, reset=False)))
        parts = [self.model_(part.double()) for part in torch.split(rows, EVAL_BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def transform(self, X: object) -> NDArray[np.float64]:
        """Return what the heads receive of each row, [N, d]: representations of tasks that have their own side by side.

        The form of the result follows ``set_output(transform="pandas" | "polars" | "default")``.
        """
        check_is_fitted(self)
        rows = torch.from_numpy(encode_inputs(self.encoder_, check_inputs(self, X, reset=False)))
        return self._representation(rows).numpy()

    def _representation(self, rows: Tensor) -> Tensor:
        hook = RepresentationHook(self.model_)
        found = []
        try:
            for part in torch.split(rows.double(), EVAL_BATCH):
                self.model_(part)
                seen = hook.take()
                found.append(torch.cat(list(seen.values()), 1) if isinstance(seen, dict) else seen)
        finally:
            hook.remove()
        return torch.cat(found)

    @property
    @torch.no_grad()
    def _n_features_out(self) -> int:
        """Return the width of :meth:`transform`'s result."""
        return self._representation(torch.zeros(1, self.n_columns_)).shape[1]

    def _predictions(self, x: object, y: pd.DataFrame | None, sensitive_features: object) -> Predictions:
        found = {name: value.float() for name, value in self._outputs(x).items()}
        n_rows = len(next(iter(found.values())))
        groups = read_groups(sensitive_features, n_rows, self.groups_)
        tasks = tuple(target.task for target in self.targets_)
        gaps = pd.Series(np.full(n_rows, np.nan))
        labels = {t.name: t.encode(gaps if y is None else y[t.column]) for t in self.targets_}
        scores = {task.name: task.score(found[task.name]) for task in tasks}
        return Predictions(tasks, scores, found, labels, groups.ids, groups.names)

    def __getstate__(self) -> dict[str, object]:
        """Return plain values and arrays: the torch model is rebuilt from its weights."""
        state: Json = {name: value for name, value in super().__getstate__().items() if name != "model_"}
        if "weights_" in state:
            state["weights_"] = {name: value.numpy() for name, value in state["weights_"].items()}
            state["history_"] = {name: values.to_numpy() for name, values in state["history_"].items()}
            state |= {"encoder_": self.encoder_.to_dict(), "targets_": [dict(vars(target)) for target in self.targets_]}
        return state

    def __setstate__(self, state: Json) -> None:
        """Rebuild the torch model; states of earlier versions hold objects of ours."""
        state = dict(state)
        if isinstance(state.get("encoder_"), dict):
            state["weights_"] = {name: torch.as_tensor(value) for name, value in state["weights_"].items()}
            state["history_"] = pd.DataFrame(state["history_"])
            state["encoder_"] = FeatureEncoder.from_dict(state["encoder_"])
            state["targets_"] = [Target(**values) for values in state["targets_"]]
        super().__setstate__(state)
        if hasattr(self, "weights_"):
            self._rebuild()

    def save(self, path: str | Path) -> Path:
        """Write the fitted estimator to one file of tensors and JSON, without pickled code.

        Raises
        ------
        CheckpointError
            It cannot be written, or a parameter or class is no plain value.
        """
        check_is_fitted(self)
        parameters = self.get_params()
        if not isinstance(parameters["random_state"], int | np.integer):
            parameters["random_state"] = None
        if parameters.get("tasks") is not None:  # JSON keys are text only
            parameters["tasks"] = [[column, kind] for column, kind in parameters["tasks"].items()]
        targets = [dict(vars(target)) for target in self.targets_]
        for target in targets:
            if (classes := target["classes"]) is not None:
                target["classes"] = {"values": classes.tolist(), "dtype": classes.dtype.str}
        about = {name.rstrip("_"): getattr(self, name, None) for name in _SAVED}
        about |= {"class": type(self).__name__, "parameters": parameters, "targets": targets}
        try:
            text = json.dumps({**about, "encoder": self.encoder_.to_dict()}, default=_plain)
        except TypeError as error:
            raise CheckpointError(f"cannot save {type(self).__name__}: {error}; give plain values") from error
        checkpoint.save(Path(path), {"kind": _KIND, "about": text, "weights": self.weights_})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote. Nothing in the file is run.

        Raises
        ------
        CheckpointError
            Missing, damaged, or of another estimator.
        """
        content = checkpoint.load(Path(path), torch.device("cpu"))
        if content.get("kind") != _KIND:
            raise CheckpointError(f"{path} holds no estimator; give a file that {cls.__name__}.save wrote")
        try:
            about = json.loads(content["about"])
            if about["class"] != cls.__name__:
                made_by = about["class"]
                raise CheckpointError(f"{path} holds a {made_by}, not a {cls.__name__}: use {made_by}.load")
            parameters = about["parameters"]
            parameters["hidden"] = tuple(parameters["hidden"])
            if parameters.get("tasks") is not None:
                parameters["tasks"] = {_column(column): kind for column, kind in parameters["tasks"]}
            made = cls(**parameters)
            for name in _SAVED:
                value = about[name.rstrip("_")]
                if value is not None or name == "structure_":
                    setattr(made, name, np.array(value, dtype=object) if name == "feature_names_in_" else value)
            made.encoder_ = FeatureEncoder.from_dict(about["encoder"])
            made.targets_ = [_target(entry) for entry in about["targets"]]
            made.weights_, made.history_ = content["weights"], pd.DataFrame()
            made._rebuild()
            made._publish()
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); save the estimator again") from error
        return made

    def _publish(self) -> None:
        """Set what scikit-learn looks for beyond ``targets_``."""


def _target(values: Json) -> Target:
    kept = values["classes"]
    classes = None if kept is None else np.array(kept["values"], dtype=np.dtype(kept["dtype"]))
    return Target(**{**values, "column": _column(values["column"]), "classes": classes})


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is no plain value")


def _column(label: object) -> object:
    """Return a column's label: JSON makes a list of a tuple."""
    return tuple(map(_column, label)) if isinstance(label, list) else label
