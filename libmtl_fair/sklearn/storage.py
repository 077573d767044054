"""Fitted estimators as files: tensors and JSON, read with ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from libmtl_fair.data.features import FeatureEncoder
from libmtl_fair.errors import CheckpointError
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.sklearn.targets import Target

_KIND = "libmtl_fair estimator"


def save(estimator: Any, path: Path) -> Path:
    """Write a fitted estimator."""
    parameters = estimator.get_params()
    if not isinstance(parameters["random_state"], int | np.integer):
        parameters["random_state"] = None
    if parameters.get("tasks") is not None:
        parameters["tasks"] = [
            [column, kind] for column, kind in parameters["tasks"].items()
        ]  # JSON keys are text only
    names = getattr(estimator, "feature_names_in_", None)
    about = {
        "class": type(estimator).__name__,
        "parameters": parameters,
        "encoder": estimator.encoder_.to_dict(),
        "targets": [_target(target) for target in estimator.targets_],
        "groups": estimator.groups_,
        "structure": estimator.structure_,
        "n_columns": estimator.n_columns_,
        "n_features_in": estimator.n_features_in_,
        "feature_names_in": None if names is None else list(names),
        "form": getattr(estimator, "form_", None),
    }
    try:
        text = json.dumps(about, default=_plain)
    except TypeError as error:
        raise CheckpointError(f"cannot save {type(estimator).__name__}: {error}; give plain values") from error
    checkpoint.save(path, {"kind": _KIND, "about": text, "weights": estimator.weights_})
    return path


def load(cls: Any, path: Path) -> Any:
    """Read a fitted estimator of class ``cls``."""
    content = checkpoint.load(path, torch.device("cpu"))
    if content.get("kind") != _KIND:
        raise CheckpointError(f"{path} holds no estimator; give a file that {cls.__name__}.save wrote")
    try:
        about = json.loads(content["about"])
        if about["class"] != cls.__name__:
            raise CheckpointError(f"{path} holds a {about['class']}, not a {cls.__name__}: use {about['class']}.load")
        parameters = {k: tuple(v) if k == "hidden" else v for k, v in about["parameters"].items()}
        if parameters.get("tasks") is not None:
            parameters["tasks"] = {_column(column): kind for column, kind in parameters["tasks"]}
        made = cls(**parameters)
        made.encoder_ = FeatureEncoder.from_dict(about["encoder"])
        made.targets_ = [_read_target(entry) for entry in about["targets"]]
        made.groups_, made.structure_ = about["groups"], about["structure"]
        made.weights_, made.history_ = content["weights"], pd.DataFrame()
        made.n_features_in_ = about["n_features_in"]
        if about["feature_names_in"] is not None:
            made.feature_names_in_ = np.array(about["feature_names_in"], dtype=object)
        if about["form"] is not None:
            made.form_ = about["form"]
        made._rebuild(about["n_columns"])
        made._publish()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged ({error}); save the estimator again") from error
    return made


def _target(target: Target) -> dict[str, Any]:
    values = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    classes = target.classes
    kept = None if classes is None else {"values": classes.tolist(), "dtype": classes.dtype.str}
    return {**values, "classes": kept}


def _read_target(values: dict[str, Any]) -> Target:
    kept = values["classes"]
    classes = None if kept is None else np.array(kept["values"], dtype=np.dtype(kept["dtype"]))
    return Target(**{**values, "column": _column(values["column"]), "classes": classes})


def _plain(value: Any) -> Any:
    """Return a numpy number as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is no plain value")


def _column(label: Any) -> Any:
    """Return a column's label: JSON makes a list of a tuple."""
    return tuple(map(_column, label)) if isinstance(label, list) else label
